"""What a Python call returns: measures by name, and reports whose entries are attributes; notebooks show tables."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, overload

from potstill.core.measure import Measure
from potstill.core.measure_table import format_measure, list_columns


class ModelMeasures(Sequence[Measure]):
    """The measures of one model: `measures.bits_per_byte.value`, `.low`, `.high`, or a sequence of `Measure`s."""

    def __init__(self, name: str, measures: Sequence[Measure]) -> None:
        self.name, self._measures = name, tuple(measures)

    def __getattr__(self, name: str) -> Measure:
        """The measure of this name. Raises: AttributeError that lists what was measured."""
        measures = {} if name.startswith("_") else {measure.name: measure for measure in self._measures}
        if name not in measures:
            raise AttributeError(f"{name!r} was not measured; there is {', '.join(measures) or 'nothing'}")
        return measures[name]

    @overload
    def __getitem__(self, index: int) -> Measure: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Measure]: ...
    def __getitem__(self, index: int | slice) -> Measure | Sequence[Measure]:
        return self._measures[index]

    def __len__(self) -> int:
        return len(self._measures)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(measure.name for measure in self._measures)]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return ", ".join(f"{measure.name} {format_measure(measure)}" for measure in self._measures)


class MeasureTable(Mapping[str, ModelMeasures]):
    """The measures of several models by their name, and as a table."""

    def __init__(self, measures: Mapping[str, Sequence[Measure | Mapping[str, Any]]]) -> None:
        self._models = {
            name: ModelMeasures(name, [m if isinstance(m, Measure) else Measure(**m) for m in values])
            for name, values in measures.items()
        }

    def __getitem__(self, name: str) -> ModelMeasures:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def list_rows(self) -> list[list[str]]:
        """The header and a row for each model, as text."""
        models = {name: {m.name: m for m in measures} for name, measures in self._models.items()}
        columns = list_columns(models.values())
        rows = [[name, *(format_measure(measures.get(c.name)) for c in columns)] for name, measures in models.items()]
        return [["model", *(column.column for column in columns)], *rows]

    def __repr__(self) -> str:
        rows = self.list_rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        header, *rows = self.list_rows()
        return make_html_table(rows, header=header)


class Report(Mapping[str, Any]):
    """A result as a mapping whose entries are attributes too: `report.memory.peak` or `report["memory"]["peak"]`."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = dict(entries)

    def __getattr__(self, name: str) -> Any:
        """The entry of this name. Raises: AttributeError that lists the entries."""
        if name.startswith("_") or name not in self._entries:
            raise AttributeError(f"there is no entry {name!r}; there is {', '.join(self.__dict__.get('_entries', {}))}")
        return self[name]

    def __getitem__(self, name: str) -> Any:
        value = self._entries[name]
        return Report(value) if isinstance(value, Mapping) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._entries]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dict(self._entries)

    def __repr__(self) -> str:
        return f"Report({self._entries!r})"

    def _repr_html_(self) -> str:
        return make_html_table([[name, str(value)] for name, value in flatten(self._entries)])


def flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested mappings by their dotted names."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def make_html_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> str:
    """An HTML table of texts, which are escaped."""
    head = f"<thead><tr>{''.join(f'<th>{escape(text)}</th>' for text in header)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"
