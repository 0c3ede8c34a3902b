"""Data sets: from text on disk to packed batches. `potstill.data(...)` describes one, as `potstill data` does."""

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """This package, which is a function too: the command `data` and the package share the name `potstill.data`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What `potstill.api.data` returns."""
        return import_module("potstill.api").data(*arguments, **options)

    @property
    def __signature__(self) -> Signature:
        return signature(import_module("potstill.api").data)


sys.modules[__name__].__class__ = CallableModule
