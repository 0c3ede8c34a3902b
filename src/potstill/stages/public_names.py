"""Names for a card that others read: folders of this machine are left out of them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUOTED_PATH = re.compile(r"'(?:~|/|[A-Za-z]:\\)[^'\n]*'")
PATH = re.compile(r"(?<![\w<:/.~-])(?:~|/|[A-Za-z]:\\)[^\s'\"`|)\]},;<>#]+")


def get_public_name(place: str) -> str:
    """The name of a model or a data set: of a path its last part, else `place` itself.

    A server keeps its address, without the folder of its model. `NAME=PLACE`, one of several teachers, keeps `NAME`.
    """
    if re.match(r"https?://", place) and "#/" in place:
        address, _, model = place.partition("#")
        return f"{address}#{_get_last_part(model)}"
    label, separator, location = place.rpartition("=")
    if re.match(r"https?://", location) or not location:
        return place
    path = Path(location).expanduser()
    if path.is_absolute() or location.startswith(".") or "\\" in location or path.exists():
        return f"{label}{separator}{_get_last_part(str(path.resolve()) if location.startswith('.') else location)}"
    return place


def get_public_data_name(name: str) -> str:
    """The public name of a data set, or of each part of a mixture, which is called `A + B`."""
    return " + ".join(map(get_public_name, name.split(" + ")))


def hide_folders(text: str) -> str:
    """`text` with the last part of every absolute path in place of the path, such as a command or an error."""
    text = QUOTED_PATH.sub(lambda match: f"'{_get_last_part(match[0][1:-1])}'", text)
    return PATH.sub(lambda match: _get_last_part(match[0]), text)


def hide_folders_in(value: Any) -> Any:
    """Plain data with `hide_folders` applied to every text in it."""
    if isinstance(value, str):
        return hide_folders(value)
    if isinstance(value, Mapping):
        return {hide_folders(name): hide_folders_in(item) for name, item in value.items()}
    return [hide_folders_in(item) for item in value] if isinstance(value, list | tuple) else value


def _get_last_part(path: str) -> str:
    return next((part for part in reversed(re.split(r"[\\/]+", path)) if part), path)
