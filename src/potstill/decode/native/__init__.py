"""The decoding pass in C, compiled on first use, for networks that a blueprint describes."""
