"""Documents as two tokenizers read them, and which of their tokens belong together."""
