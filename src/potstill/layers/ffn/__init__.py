"""Kinds of feed-forwards, one file each: `(x, positions) -> y`."""
