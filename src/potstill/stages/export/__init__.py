"""Export: a model in the format of another runtime, with its tokens compared and the commands that run it."""
