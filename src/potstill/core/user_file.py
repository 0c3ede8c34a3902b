"""Loads a function or a class from a file of the user, which an option names as FILE.py:NAME."""

import re
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from potstill.core.errors import NotFound, UsageError

USER_SYMBOL = re.compile(r"(?P<file>.+\.py):(?P<symbol>[A-Za-z_]\w*)")


def load_user_symbol(name: str, *, flag: str) -> Callable[..., Any]:
    """The function or class that FILE.py:NAME names; a file runs once for each content.

    Raises: NotFound if there is no such file; UsageError if it fails to run or does not define the name.
    """
    match = USER_SYMBOL.fullmatch(name)
    assert match is not None
    file, symbol = match["file"], match["symbol"]
    module = _run_file(file, read_user_file(file, flag=flag))
    value = getattr(module, symbol, None)
    if not callable(value):
        names = [key for key, item in vars(module).items() if getattr(item, "__module__", None) == module.__name__]
        raise UsageError(f"{file} defines no function or class {symbol!r}; it defines {', '.join(names) or 'none'}")
    return cast(Callable[..., Any], value)


def read_user_file(file: str, *, flag: str) -> bytes:
    """The content of a file that the option `flag` names.

    Raises: NotFound.
    """
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise NotFound(f"there is no readable file {file} for {flag}; give FILE.py:FUNCTION") from error


@cache
def _run_file(file: str, content: bytes) -> ModuleType:
    module = ModuleType(f"potstill_user_{sha256(content).hexdigest()[:16]}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        exec(compile(content, file, "exec"), module.__dict__)
    except Exception as error:
        raise UsageError(f"{file} does not run: {type(error).__name__}: {error}; fix it") from error
    return module
