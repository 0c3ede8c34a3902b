"""Measures: quality, size, speed."""
