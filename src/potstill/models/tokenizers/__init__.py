"""Compares tokenizers: shared ids, the bytes of a token, the nearest token."""
