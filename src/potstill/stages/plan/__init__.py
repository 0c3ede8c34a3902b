"""Memory, time and disk of a distillation, before it starts."""
