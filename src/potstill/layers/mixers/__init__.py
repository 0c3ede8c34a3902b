"""Token mixers: `(x, state) -> (y, state)`."""
