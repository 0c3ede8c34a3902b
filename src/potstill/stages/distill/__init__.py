"""Distillation: a teacher, a student and a data set in, a trained and measured student out."""
