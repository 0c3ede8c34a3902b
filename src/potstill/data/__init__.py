"""Text on disk to packed batches."""
