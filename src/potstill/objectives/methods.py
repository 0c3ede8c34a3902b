"""Objectives that have to know both networks before training, by name: how each is built, and between whom."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from potstill.core.types import Objective
from potstill.objectives.bridge import AlignedRows, CrossAttention
from potstill.objectives.dual_space import DualSpace, DualSpaceV2, Spaces
from potstill.objectives.sides import Sides
from potstill.ops.divergence import Divergence


class Asked(NamedTuple):
    """What a user says of an objective: its name, the divergence inside it, its temperature and other numbers."""

    name: str
    divergence: Divergence
    temperature: float
    options: Mapping[str, float]

    @property
    def spaces(self) -> Spaces:
        """The same for a dual-space objective."""
        return Spaces(divergence=self.divergence, temperature=self.temperature, name=self.name)


class Method(NamedTuple):
    """`build` makes the objective; `alike` and `across` say whether it works with one tokenizer and between two.

    `options` are the numbers that it takes, with their defaults; `divergence` says whether it takes one.
    """

    build: Callable[[Sides, Asked], Objective]
    alike: bool = True
    across: bool = False
    divergence: bool = True
    options: Mapping[str, float] = MappingProxyType({})


def dskd(sides: Sides, asked: Asked) -> Objective:
    """`DualSpace` row by row."""
    return DualSpace(sides.student.width, sides.teacher.width, asked.spaces)


def dskd_cma(sides: Sides, asked: Asked) -> Objective:
    """`DualSpace` by cross-model attention."""
    student, teacher = sides.student, sides.teacher
    bridge = CrossAttention(student.width, teacher.width, spread=teacher.spread())
    return DualSpace(student.width, teacher.width, asked.spaces, bridge)


def dskdv2(sides: Sides, asked: Asked) -> Objective:
    """`DualSpaceV2` row by row."""
    return DualSpaceV2(sides.student.head.weight, sides.teacher.head.weight, asked.spaces)


def dskdv2_eta(sides: Sides, asked: Asked) -> Objective:
    """`DualSpaceV2` at exactly aligned tokens."""
    weights = sides.student.head.weight, sides.teacher.head.weight
    return DualSpaceV2(*weights, asked.spaces, AlignedRows(), sides.same_strings)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dskd": Method(dskd),
        "dskd_cma": Method(dskd_cma, across=True),
        "dskdv2": Method(dskdv2),
        "dskdv2_eta": Method(dskdv2_eta, across=True),
    }
)
