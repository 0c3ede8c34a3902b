"""Objectives that have to know both networks before training, by name: how each is built, and between whom."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from potstill.core.errors import UsageError
from potstill.core.types import Objective
from potstill.objectives.bridge import AlignedRows, CrossAttention
from potstill.objectives.combine import Sum
from potstill.objectives.distill import Distill
from potstill.objectives.dual_space import DualSpace, DualSpaceV2, Spaces
from potstill.objectives.edited import Edited
from potstill.objectives.hidden import Hidden, evenly, layer_map, require_layers
from potstill.objectives.merged import Merged
from potstill.objectives.optimal import SortedGap
from potstill.objectives.policy import PolicyGradient
from potstill.objectives.ranking import Ranking
from potstill.objectives.relations import Relations, most_heads
from potstill.objectives.sides import Sides
from potstill.ops.divergence import Divergence, reverse_kl

MAP = "map"  # the option that names the layers of `hidden`


class Asked(NamedTuple):
    """What a user says of an objective: name, the divergence inside it, temperature, other numbers, and texts."""

    name: str
    divergence: Divergence
    temperature: float
    options: Mapping[str, float]
    texts: Mapping[str, str]

    @property
    def spaces(self) -> Spaces:
        """The same for a dual-space objective."""
        return Spaces(divergence=self.divergence, temperature=self.temperature, name=self.name)

    def whole(self, option: str) -> int:
        """The option of this name as a number of things.

        Raises: UsageError where it is no whole number of 1 or more.
        """
        value = self.options[option]
        if not (value >= 1 and float(value).is_integer()):
            raise UsageError(f"{self.name}: {option} = {value:g} counts nothing; choose a whole number of 1 or more")
        return int(value)


class Method(NamedTuple):
    """`build` makes the objective; `alike` and `across` say whether it works with one tokenizer and between two.

    `options` are the numbers that it takes, with their defaults, and `texts` names what else it can be told;
    `divergence` says whether it takes one, and `warped` whether rows of two tokenizers have to be paired by edit
    distance. What is `recalled` asks a teacher for its last hidden states and its head alone, so that a cache that kept
    those states can take the place of its body.
    """

    build: Callable[[Sides, Asked], Objective]
    alike: bool = True
    across: bool = False
    divergence: bool = True
    warped: bool = False
    recalled: bool = False
    options: Mapping[str, float] = MappingProxyType({})
    texts: tuple[str, ...] = ()


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
    return DualSpaceV2(sides.student.head.weight, sides.teacher.head.weight, asked.spaces, scale=sides.scale)


def dskdv2_eta(sides: Sides, asked: Asked) -> Objective:
    """`DualSpaceV2` at exactly aligned tokens."""
    weights = sides.student.head.weight, sides.teacher.head.weight
    return DualSpaceV2(*weights, asked.spaces, AlignedRows(), sides.same_strings, sides.scale)


def minillm(sides: Sides, asked: Asked) -> Objective:
    """The policy's gradient and the single step by which the next token alone is judged, both weighing 1."""
    single = Distill(divergence=reverse_kl, temperature=asked.temperature, name=f"{asked.name}_single_step")
    mixed, scale, clip, discount = (asked.options[name] for name in MINILLM)
    policy = PolicyGradient(mixed=mixed, scale=scale, clip=clip, discount=discount, name=f"{asked.name}_policy")
    return Sum((1.0, policy), (1.0, single))


MINILLM = MappingProxyType({"mixed": 0.2, "scale": 0.5, "clip": 0.2, "discount": 0.95})  # those of `PolicyGradient`


def uld(sides: Sides, asked: Asked) -> Objective:
    """`SortedGap`."""
    return SortedGap(temperature=asked.temperature, name=asked.name)


def tie_kd(sides: Sides, asked: Asked) -> Objective:
    """`Ranking`."""
    return Ranking(k=asked.whole("k"), divergence=asked.divergence, temperature=asked.temperature, name=asked.name)


def mined(sides: Sides, asked: Asked) -> Objective:
    """`Edited`."""
    return Edited(sides.nearest, sides.vocabularies[0], temperature=asked.temperature, name=asked.name)


def spans(sides: Sides, asked: Asked) -> Objective:
    """`Merged`."""
    return Merged(
        sides.same_strings,
        sides.vocabularies,
        divergence=asked.divergence,
        temperature=asked.temperature,
        name=asked.name,
    )


def hidden(sides: Sides, asked: Asked) -> Objective:
    """`Hidden` at the layers of a `map`, else at some evenly spread."""
    student, teacher = sides.student, sides.teacher
    depths = student.depth, teacher.depth
    layers = layer_map(asked.texts[MAP]) if MAP in asked.texts else evenly(depths, asked.whole("layers"))
    require_layers(layers, depths)
    return Hidden((student.width, teacher.width), layers, name=asked.name)


def relations(sides: Sides, asked: Asked) -> Objective:
    """`Relations` with as many heads as divide the teacher's widths."""
    widths = sides.teacher.relations
    return Relations(sides.student.width, widths, heads=most_heads(widths, asked.whole("heads")))


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "dskd": Method(dskd, recalled=True),
        "dskd_cma": Method(dskd_cma, across=True),
        "dskdv2": Method(dskdv2, recalled=True),
        "dskdv2_eta": Method(dskdv2_eta, across=True),
        "minillm": Method(minillm, divergence=False, options=MINILLM),
        "uld": Method(uld, across=True, divergence=False),
        "mined": Method(mined, across=True, divergence=False, warped=True),
        "spans": Method(spans, across=True),
        "tie_kd": Method(tie_kd, recalled=True, options=MappingProxyType({"k": 5})),
        "hidden": Method(hidden, across=True, divergence=False, options=MappingProxyType({"layers": 4}), texts=(MAP,)),
        "relations": Method(relations, across=True, divergence=False, options=MappingProxyType({"heads": 32})),
    }
)
