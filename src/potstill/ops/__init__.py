"""Pure functions of tensors: each with its definition and, where it is slow, a fast form that tests compare with it."""
