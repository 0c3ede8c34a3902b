"""Conversions: each changes what the layers of a trained model are, and starts from its weights."""
