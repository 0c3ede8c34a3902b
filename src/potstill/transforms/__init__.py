"""Blueprint -> Blueprint and Weights -> Weights."""
