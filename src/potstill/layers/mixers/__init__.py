"""Kinds of mixers, one file each: `(x, positions, state) -> (y, state)`."""
