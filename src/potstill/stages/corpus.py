"""Loads the data of a stage, as its options say."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from potstill.core.errors import UsageError
from potstill.data.corpus import Corpus
from potstill.data.mixture import load_mixture
from potstill.data.row_reader import DocumentLabel


@runtime_checkable
class CorpusOptions(Protocol):
    """The options that say which documents a stage reads."""

    @property
    def data(self) -> str | tuple[str, ...]: ...
    @property
    def columns(self) -> str: ...
    @property
    def on_bad_row(self) -> str: ...
    @property
    def mix_exponent(self) -> float: ...


def load_data(
    options: CorpusOptions,
    *,
    split: str = "train",
    label: DocumentLabel | None = None,
    load: Callable[..., Corpus] = load_mixture,
) -> Corpus:
    """A split of the data of a stage; with a `label`, each document has its number. `load` reads it, as text or others.

    Raises: as `load` does.
    """
    return load(
        options.data,
        split=split,
        exponent=options.mix_exponent,
        columns=parse_columns(options.columns),
        label=label,
        on_bad_row=options.on_bad_row,
    )


def parse_columns(option: str) -> dict[str, str] | None:
    """`prompt=instruction,response=text` as `{"prompt": "instruction", "response": "text"}`; None where it is empty.

    Raises: UsageError.
    """
    if not option:
        return None
    pairs = [pair.partition("=") for pair in option.split(",")]
    if not all(name and column for name, _, column in pairs):
        raise UsageError(f"--columns {option!r} is not NAME=COLUMN,... such as prompt=instruction,response=text")
    return {name.strip(): column.strip() for name, _, column in pairs}
