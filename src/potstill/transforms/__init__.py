"""Transforms of architectures and their weights: Blueprint -> Blueprint, and Weights -> Weights."""
