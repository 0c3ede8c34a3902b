"""Documents in the tokens of two tokenizers, and the alignment of these tokens."""
