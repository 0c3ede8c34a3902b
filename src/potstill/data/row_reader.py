"""Rows become documents of one kind; what cannot be trained on is left out and counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from potstill.core.errors import DataError
from potstill.data.files import Record
from potstill.data.schema import Document, Kind, MalformedRow, find_lack, recognize_schema


class Route(NamedTuple):
    """A column that says whose a document is: the number of its value among `values` is the document's `route`."""

    column: str
    values: tuple[str, ...]

    def find_index(self, row: Mapping[str, Any], location: str) -> int:
        """The route of a row.

        Raises: DataError where the column is missing or holds none of the values.
        """
        if self.column not in row:
            raise DataError(f"{location} has no column `{self.column}` to route by; it has {', '.join(map(str, row))}")
        value = str(row[self.column])
        if value not in self.values:
            raise DataError(
                f"{location} has {value!r} in `{self.column}`, and no teacher has that name; the names are "
                f"{', '.join(self.values)}"
            )
        return self.values.index(value)


class RowReader:
    """Reads the rows of sources that are all of one kind; `dropped` and `unread` say afterwards what was left out.

    With a `route` each document has the number that it says, under `route`.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, route: Route | None = None) -> None:
        self.columns, self.route = columns, route
        self.dropped: Counter[str] = Counter()
        self.unread_columns: set[str] = set()
        self.kind: Kind | None = None
        self._first_source = ""

    def read_documents(self, rows: Iterable[Record], *, source: str) -> Iterator[Document]:
        """The documents of one source, which an error calls `source`; its first row says of what shape they are.

        Raises: DataError for a row of another shape, or a source of another kind than those before.
        """
        schema = None
        for row, location in rows:
            if schema is None:
                schema = recognize_schema(row.keys(), source, columns=self.columns)
                self._check_kind(schema.kind, source)
            route_columns = () if self.route is None else (self.route.column,)
            self.unread_columns.update(row.keys() - {*schema.columns, *schema.optional_columns, *route_columns})
            try:
                document = schema.to_document(row)
            except MalformedRow as error:
                raise DataError(f"{location} {error}") from error
            reason = find_lack(document)
            if reason is None:
                yield document if self.route is None else {**document, "route": self.route.find_index(row, location)}
            else:
                self.dropped[reason] += 1

    def _check_kind(self, kind: Kind, source: str) -> None:
        if self.kind not in (None, kind):
            raise DataError(
                f"{source} holds {kind} where {self._first_source} holds {self.kind}; one data set has to be "
                f"of one kind"
            )
        self.kind, self._first_source = kind, self._first_source or source
