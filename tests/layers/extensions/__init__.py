"""Kinds of parts that are not shipped: one file each, as a user would write it. They keep the laws of all kinds."""
