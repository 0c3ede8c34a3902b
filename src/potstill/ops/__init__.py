"""Pure functions of tensors: each with its definition, its fast form and a proof that both agree."""
