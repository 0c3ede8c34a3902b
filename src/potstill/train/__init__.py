"""The training module and its trainer."""
