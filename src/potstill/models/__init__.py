"""Backbones, families of Hugging Face models, and the signals of a model for a batch."""
