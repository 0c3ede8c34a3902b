"""Sampling and speculation."""
