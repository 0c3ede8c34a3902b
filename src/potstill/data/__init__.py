"""Data sets: from text on disk to packed batches."""
