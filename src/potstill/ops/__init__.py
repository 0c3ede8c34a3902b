"""Pure functions of tensors, each with its definition. A slow definition has a fast form, and tests compare both."""
