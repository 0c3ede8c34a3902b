"""What a misspelled name probably means, for the sentence of an error."""

import difflib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def suggest(name: str, names: Iterable[str]) -> str:
    """` (did you mean 'forward_kl'?)` for the one of `names` that looks most like `name`; empty if none does."""
    spellings = {_fold(candidate): candidate for candidate in names}
    matches = difflib.get_close_matches(_fold(name), spellings, n=1, cutoff=0.6)
    return f" (did you mean {spellings[matches[0]]!r}?)" if matches else ""


def suggest_path(path: Path, names: Iterable[str] = ()) -> str:
    """The same for a path that does not exist: its neighbors in the folder, and `names`."""
    siblings: list[str] = []
    with suppress(OSError):
        siblings = [str(path.with_name(entry.name)) for entry in path.parent.iterdir()]
    return suggest(str(path), [*names, *siblings])


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_")
