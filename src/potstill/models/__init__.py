"""Backbones, families of Hugging Face models, and what a model says about a batch."""
