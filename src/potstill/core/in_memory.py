"""Objects of the caller by name: potstill writes them to a temporary folder, and every reader finds it by their name.

A name is `memory:` and a digest of the content, so that cards and resumed runs name the same content alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_MEMORY = "memory:"
_PATHS: dict[str, Path] = {}


def resolve_path(name: str | Path) -> Path:
    """The path of `name`: that of an object in memory, else the path itself with the home folder expanded."""
    return _PATHS.get(str(name)) or Path(name).expanduser()


@contextmanager
def register_path(path: Path, digest: str) -> Iterator[str]:
    """The name of an object that was written to `path`, valid during the block."""
    name = f"{IN_MEMORY}{digest[:16]}"
    previous = _PATHS.get(name)
    _PATHS[name] = path
    try:
        yield name
    finally:
        if previous is None:
            _PATHS.pop(name, None)
        else:
            _PATHS[name] = previous
