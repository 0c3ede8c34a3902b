"""Drafters: each proposes the next tokens of a text, which the target then verifies in one pass."""
