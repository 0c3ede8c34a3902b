"""Objectives: what is minimized."""
