"""Training Medusa heads on a frozen target."""
