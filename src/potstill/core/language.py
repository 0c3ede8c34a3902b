"""Languages as numbers, so that tensors can hold the language of a document."""

import zlib

from potstill.core.errors import UsageError

LANGUAGE_COLUMN = "language"  # the column of the data that names it, by default


def number_language(name: str) -> int:
    """A number of 31 bits, the same for a name in every process: the lowest bits of its CRC-32."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def parse_languages(text: str) -> tuple[str, ...]:
    """The languages that `en/fr` names.

    Raises: UsageError if it names none.
    """
    names = tuple(filter(None, text.split("/")))
    if not names:
        raise UsageError("name the old languages as the data does, such as old=en, or old=en/fr for several")
    return names
