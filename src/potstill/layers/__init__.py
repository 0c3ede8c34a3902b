"""nn.Modules, and the kinds of parts with their facts.

Importing this package registers every built-in kind: each file in `mixers/`, `ffn/` and `linear/`, and `depth.py`.
"""

from importlib import import_module
from pkgutil import iter_modules

for _folder in ("mixers", "ffn", "linear"):
    _package = import_module(f"{__name__}.{_folder}")
    for _module in iter_modules(_package.__path__):
        import_module(f"{_package.__name__}.{_module.name}")

import_module(f"{__name__}.depth")
