"""Eval mode inside a `with` block; afterwards each module returns to its own mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule returns to its own mode, even if modes were mixed."""
    training_modules = [module for module in model.modules() if module.training]
    if training_modules:
        model.eval()
    try:
        yield
    finally:
        for module in training_modules:
            module.training = True
