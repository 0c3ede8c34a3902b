"""Objectives compared under equal conditions."""
