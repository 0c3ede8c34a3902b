"""Compares objectives under equal conditions."""
