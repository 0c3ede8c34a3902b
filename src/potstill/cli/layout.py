"""The layout of tables: no name or number is cut, however narrow the terminal is.

Text wraps at spaces only, and an interval goes to the second line of its cell. Columns that do not fit next to each
other go to a further table that repeats the first column.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP = 2  # spaces between two columns
PROSE_WIDTH = 14  # a column of longer texts is at least this wide, so that it does not hold one word a line
VALUE_AND_INTERVAL = re.compile(r"([-+]?[\d.,]+) (\[[^\[\]]+\])")


class Column(NamedTuple):
    """A column with its widths: the least at which no word is cut, and the one at which nothing wraps."""

    header: str
    cells: Sequence[Text]
    least_width: int
    full_width: int


def build_tables(headers: Sequence[str], rows: Sequence[Sequence[str | Text]], *, width: int) -> list[Table]:
    """The rows as tables of at most `width` characters; each repeats the first column."""
    columns = [
        make_column(header, [split_interval(row[index]) for row in rows], width=width)
        for index, header in enumerate(headers)
    ]
    return [build_table(group, width=width) for group in group_columns(columns, width=width)]


def split_interval(cell: str | Text) -> Text:
    """The cell as text; `0.93 [0.91, 0.95]` gets two lines."""
    if isinstance(cell, Text):
        return cell
    match = VALUE_AND_INTERVAL.fullmatch(cell)
    return Text(f"{match[1]}\n{match[2]}" if match else cell)


def make_column(header: str, cells: Sequence[Text], *, width: int) -> Column:
    """A column with its widths; a word longer than half of the table continues on the next line."""
    lines = [line for cell in cells for line in cell.plain.split("\n")]
    cell_width = max(map(cell_len, lines), default=0)
    words = [word for line in [header, *lines] for word in ([line] if line.startswith("[") else line.split())]
    longest_word = min(max(map(cell_len, words), default=1), width // 2)
    return Column(header, cells, max(longest_word, min(cell_width, PROSE_WIDTH)), max(cell_width, cell_len(header)))


def group_columns(columns: Sequence[Column], *, width: int) -> list[list[Column]]:
    """The columns in groups that fit into `width`, each with the first column."""
    groups = [[columns[0]]]
    for column in columns[1:]:
        candidate = [*groups[-1], column]
        if len(groups[-1]) > 1 and sum(c.least_width + GAP for c in candidate) - GAP > width:
            groups.append([columns[0], column])
        else:
            groups[-1] = candidate
    return groups


def build_table(columns: Sequence[Column], *, width: int) -> Table:
    """One table; what is left of `width` goes to the columns that wrap, by how much they lack."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    room = width - sum(column.least_width + GAP for column in columns) + GAP
    lack = sum(column.full_width - column.least_width for column in columns)
    for column in columns:
        own_lack = column.full_width - column.least_width
        extra = own_lack if lack <= room else max(0, room) * own_lack // lack
        table.add_column(column.header, width=column.least_width + extra, overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table
