"""Estimates the operations, memory, time and disk of a run."""
