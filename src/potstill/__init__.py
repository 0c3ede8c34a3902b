"""potstill makes language models small and fast: a teacher and a budget go in, a small, measured student comes out."""

__version__ = "0.1.0"
