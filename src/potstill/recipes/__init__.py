"""Recipes: one file of plain values per published method."""
