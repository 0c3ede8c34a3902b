"""The names of the conversions, read from the text of their files, because importing them imports torch."""

import re
from pathlib import Path

REGISTRATION = re.compile(r'^@register_conversion\(\s*"(\w+)"', re.MULTILINE)


def list_conversion_names() -> list[str]:
    """The names that `--to` takes."""
    return sorted(name for names in _read_names().values() for name in names)


def list_conversion_modules() -> list[str]:
    """The modules that register a conversion."""
    return [f"potstill.transforms.convert.{stem}" for stem in _read_names()]


def _read_names() -> dict[str, list[str]]:
    files = sorted(Path(__file__).parent.glob("to_*.py"))
    return {file.stem: REGISTRATION.findall(file.read_text(encoding="utf-8")) for file in files}
