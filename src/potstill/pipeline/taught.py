"""What an objective computes and holds beside both networks' blocks, counted from values alone.

A product is a row times a head: 2 V D operations for V ids and a width of D. The loss of the student itself is one
product forward and one or two backward (`Workload.flops`); here is what its teacher adds, and the weights that an
objective trains beside the student. Written down by hand from `objectives/`, and held against what is built and what
torch counts by `tests/pipeline/test_taught.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from potstill.core.blueprint import Blueprint
from potstill.objectives.hidden import layer_map
from potstill.objectives.methods import MAP
from potstill.objectives.named import Mixture


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Both shapes, and the rows of a pass: of the student, of the teacher, paired ones, and of a row's own document.

    `numbers` are the options of the method, `compute_bytes` an entry's in the dtype of the products.
    """

    student: Blueprint
    teacher: Blueprint
    vocabularies: tuple[int, int]
    rows: float
    others: float
    pairs: float
    near: float
    numbers: Mapping[str, float]
    compute_bytes: int

    @property
    def widths(self) -> tuple[int, int]:
        """Of the hidden states."""
        return self.student.hidden, self.teacher.hidden


class Taught(NamedTuple):
    """Of a pass: products with the student's head and with the teacher's, other operations; weights that are trained.

    `whole` says how many rows of logits over either vocabulary are said of each row of a chunk, `held` the bytes that
    a pass holds beside them.
    """

    student: float = 0.0
    teacher: float = 0.0
    other: float = 0.0
    weights: int = 0
    whole: tuple[int, int] = (0, 0)
    held: float = 0.0


def taught(mixture: Mixture, asked: Asked) -> Taught:
    """The share of the teacher in `mixture`; nothing where it teaches nothing."""
    if not mixture.teaches:
        return Taught()
    return COUNTS.get(mixture.name, by_logits)(asked)


def by_logits(asked: Asked) -> Taught:
    """A divergence: the teacher's logits of each row."""
    return Taught(teacher=asked.rows, whole=(0, 1))


def dskd(asked: Asked) -> Taught:
    """Z_t2s of each row, its cross-entropy with a gradient by the row; Z_t, and Z_s2t with one. Two maps with bias."""
    ours, theirs = asked.widths
    maps = 6.0 * ours * theirs * (asked.rows + asked.others)
    weights = 2 * ours * theirs + ours + theirs
    return Taught(3 * asked.rows, 3 * asked.others, maps, weights, (1, 0))


def dskd_cma(asked: Asked) -> Taught:
    """`dskd`, the query's map, and attention between the rows of a document, forward and twice back."""
    ours, theirs = asked.widths
    found, near = dskd(asked), asked.near * asked.others / asked.rows
    query, crossed = 24.0 * ours * theirs, 6.0 * near * (3 * theirs + ours)
    more = asked.rows * (query + crossed)
    return found._replace(other=found.other + more, weights=found.weights + 4 * ours * theirs + 2 * theirs)


def dskdv2(asked: Asked) -> Taught:
    """`dskd` at the pairs. One map is trained, one found in each pass."""
    ours, theirs = asked.widths
    shared = min(asked.vocabularies)
    maps = 10.0 * ours * theirs * asked.pairs + 2.0 * shared * ours * theirs
    held = 4.0 * shared * (ours + theirs) + 8.0 * theirs**2  # both heads' shared rows in float32; the inverse Gram
    products = asked.rows + 2 * asked.pairs, 3 * asked.pairs
    return Taught(*products, maps, ours * theirs, (1, 0), held)


def mined(asked: Asked) -> Taught:
    """The teacher's logits at the pairs, for the student's ids alone, by a copy of their part of its head."""
    table = asked.vocabularies[0] * asked.widths[1]
    return Taught(other=2.0 * table * asked.pairs, whole=(2, 0), held=float(asked.compute_bytes * table))


def spans(asked: Asked) -> Taught:
    """The teacher's logits of every row, and the student's of those in runs once more."""
    return Taught(student=asked.rows - asked.pairs, teacher=asked.others, whole=(2, 1))


def hidden(asked: Asked) -> Taught:
    """A map of each pair of layers, with both gradients."""
    ours, theirs = asked.widths
    depths = len(asked.student.layers), len(asked.teacher.layers)
    pairs = int(asked.numbers.get(MAP) or min(asked.numbers["layers"], *depths))
    return Taught(other=6.0 * pairs * ours * theirs * asked.pairs, weights=pairs * ours * theirs)


def relations(asked: Asked) -> Taught:
    """Three maps with both gradients, and the relations of each row to those of its document, of both networks."""
    mixer = asked.teacher.layers[-1].mixer
    wide = (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim
    near = asked.near * asked.pairs / asked.rows
    return Taught(
        other=asked.pairs * wide * (6.0 * asked.student.hidden + 8.0 * near), weights=asked.student.hidden * wide
    )


COUNTS: Mapping[str, Callable[[Asked], Taught]] = MappingProxyType(
    {
        "dskd": dskd,
        "dskd_cma": dskd_cma,
        "dskdv2": dskdv2,
        "dskdv2_eta": dskdv2,
        "mined": mined,
        "spans": spans,
        "hidden": hidden,
        "relations": relations,
    }
)


def numbers(mixture: Mixture) -> dict[str, float]:
    """The numbers of a method, and of a map of layers how many pairs it has."""
    mapped = {MAP: float(len(layer_map(str(mixture.options[MAP]))))} if MAP in mixture.options else {}
    return {**mixture.numbers, **mapped}
