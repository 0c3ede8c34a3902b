"""Alignment: a model and preferences or rewards in, a trained model that is measured before and after out."""
