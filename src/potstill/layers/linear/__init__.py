"""Kinds of linear maps, one file each."""
