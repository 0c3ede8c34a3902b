"""Tokenizers compared: the same ids, the bytes of a token, the nearest token."""
