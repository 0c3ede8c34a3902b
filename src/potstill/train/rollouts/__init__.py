"""Rollouts: completions that a model samples during training."""
