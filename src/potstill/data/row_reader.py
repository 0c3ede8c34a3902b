"""Turns rows into documents of one kind. Rows that cannot be trained on are left out and counted."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar, Literal, cast, get_args

from potstill.core.errors import DataError, UsageError
from potstill.core.language import number_language
from potstill.data.files import Record
from potstill.data.schema import EXTRA_COLUMNS, Document, Kind, Recognizer, find_lack, recognize_schema
from potstill.data.trees import join_rows
from potstill.data.turns import MalformedRow, UntrainableRow

BadRowPolicy = Literal["refuse", "skip"]
BAD_ROW = "a row that cannot be read"
SCHEMA_ROWS = 256  # rows read to recognize the columns of a source
MAX_EXAMPLES = 3  # bad rows that a report names


def check_bad_row_policy(on_bad_row: str) -> BadRowPolicy:
    """`on_bad_row` itself. Raises: UsageError if there is no such policy."""
    for policy in get_args(BadRowPolicy):
        if policy == on_bad_row:
            return cast(BadRowPolicy, policy)
    raise UsageError(f"--on-bad-row is {on_bad_row!r}; it can be {' or '.join(get_args(BadRowPolicy))}")


def merge_rows(records: Sequence[Record]) -> dict[str, Any]:
    """The first row, with the columns of later rows that rows may lack, such as a system prompt."""
    first_row = dict(records[0].row)
    for row, _ in records:
        for column in EXTRA_COLUMNS:
            if row.get(column) and not first_row.get(column):
                first_row[column] = row[column]
    return first_row


@dataclass(frozen=True)
class Route:
    """A column that names the teacher of a document. The index of its value in `values` is the document's `route`."""

    column: str
    values: tuple[str, ...]
    key: ClassVar[str] = "route"

    def find_number(self, row: Mapping[str, Any], location: str) -> int:
        """The index of a row's value in `values`.

        Raises: DataError if the column is missing or holds another value.
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


@dataclass(frozen=True)
class Language:
    """A column that names the language of a document, whose `language` is a number made of that name."""

    column: str
    key: ClassVar[str] = "language"

    def find_number(self, row: Mapping[str, Any], location: str) -> int:
        """The number of a row's language.

        Raises: DataError if the column is missing.
        """
        if self.column not in row:
            raise DataError(
                f"{location} has no column `{self.column}` that names its language; it has {', '.join(map(str, row))}"
            )
        return number_language(str(row[self.column]))


DocumentLabel = Route | Language  # a column whose value each document carries as a number


class RowReader:
    """Reads the rows of sources that are all of one kind.

    `drop_counts` are the rows left out, by reason; `read_columns` and `unread_columns` hold the names of the columns
    that were read and that were not, and `unread_text` of the latter those that hold text.
    With a `label`, each document has its number under the label's key. A row that does not fit the schema is refused
    or, with `on_bad_row="skip"`, left out and counted; `bad_rows` then says where the first three are, and why.
    `recognize` finds the schema of a source.
    """

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        label: DocumentLabel | None = None,
        *,
        on_bad_row: BadRowPolicy = "refuse",
        recognize: Recognizer = recognize_schema,
    ) -> None:
        self.columns, self.label, self.on_bad_row, self.recognize = columns, label, on_bad_row, recognize
        self.bad_rows: list[str] = []
        self.drop_counts: Counter[str] = Counter()
        self.read_columns: set[str] = set()
        self.unread_columns: set[str] = set()
        self.unread_text: set[str] = set()
        self.kind: Kind | None = None
        self._first_source = ""

    def read_documents(self, rows: Iterable[Record], *, source: str) -> Iterator[Document]:
        """The documents of one source, which errors call `source`. Its first rows determine the schema.

        Raises: DataError for a row that does not fit the schema, or for a source of another kind than the first.
        """
        rows = join_rows(rows, self.drop_counts)
        first_rows = list(islice(rows, SCHEMA_ROWS))
        if not first_rows:
            return
        schema = self.recognize(merge_rows(first_rows), source, columns=self.columns)
        self._check_kind(schema.kind, source)
        label_columns = () if self.label is None else (self.label.column,)
        read_columns = {*schema.columns, *schema.optional_columns, *label_columns}
        for row, location in chain(first_rows, rows):
            self._note_columns(row, read_columns)
            try:
                document = schema.to_document(row)
            except UntrainableRow as error:
                self.drop_counts[str(error)] += 1
                continue
            except MalformedRow as error:
                if self.on_bad_row == "refuse":
                    raise DataError(
                        f"{location} {error}; correct the row, or leave such rows out with --on-bad-row skip"
                    ) from error
                self.drop_counts[BAD_ROW] += 1
                self.bad_rows += [f"{location} {error}"] if len(self.bad_rows) < MAX_EXAMPLES else []
                continue
            reason = find_lack(document)
            if reason is None:
                yield self._add_label(document, row, location)
            else:
                self.drop_counts[reason] += 1

    def _add_label(self, document: Document, row: Mapping[str, Any], location: str) -> Document:
        label = self.label
        return document if label is None else {**document, label.key: label.find_number(row, location)}

    def _note_columns(self, row: Mapping[str, Any], read_columns: set[str]) -> None:
        self.read_columns |= row.keys() & read_columns
        for column in row.keys() - read_columns:
            self.unread_columns.add(column)
            if isinstance(row[column], str) and row[column].strip():
                self.unread_text.add(column)

    def _check_kind(self, kind: Kind, source: str) -> None:
        if self.kind not in (None, kind):
            raise DataError(
                f"{source} holds {kind} where {self._first_source} holds {self.kind}; all files of a data set must "
                f"be of one kind"
            )
        self.kind, self._first_source = kind, self._first_source or source
