"""The description of an objective: name, help, options, capabilities, cost, and the function that builds it.

Each objective is one file with its class and a builder under `@register_objective(...)`. The command line, the
planner and the tests include every such file of this folder.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from potstill.core.errors import UsageError
from potstill.core.types import Objective
from potstill.objectives.cost import CostFunction
from potstill.ops.divergence import Divergence

DIVERGENCE_OPTION = "divergence"  # the option that names the divergence inside an objective
TrainingData = Literal["text", "preferences", "labels", "prompts"]  # what an objective trains on


class ObjectiveOptions(NamedTuple):
    """The options of one objective: its name, its divergence, the temperature, numbers, and texts."""

    name: str
    divergence: Divergence
    temperature: float
    numeric_options: Mapping[str, float]
    text_options: Mapping[str, str]

    def get_positive_int(self, option: str) -> int:
        """The value of a numeric option as an integer.

        Raises: UsageError if it is not a whole number of at least 1.
        """
        value = self.numeric_options[option]
        if not (value >= 1 and float(value).is_integer()):
            raise UsageError(f"{self.name}: {option} is {value:g}; choose a whole number of at least 1")
        return int(value)

    def get_positive(self, option: str) -> float:
        """The value of a numeric option.

        Raises: UsageError if it is not positive and finite.
        """
        value = self.numeric_options[option]
        if not 0 < value < math.inf:
            raise UsageError(f"{self.name}: {option} is {value:g}; choose a positive number")
        return value

    def get_nonnegative(self, option: str, *, below: float = math.inf) -> float:
        """The value of a numeric option.

        Raises: UsageError if it is negative, or not below `below`.
        """
        value = self.numeric_options[option]
        if not 0 <= value < below:
            bounds = "of at least 0" if below == math.inf else f"from 0 to below {below:g}"
            raise UsageError(f"{self.name}: {option} is {value:g}; choose a number {bounds}")
        return value

    def get_flag(self, option: str) -> bool:
        """Whether a numeric option is 1.

        Raises: UsageError if it is neither 0 nor 1.
        """
        value = self.numeric_options[option]
        if value not in (0, 1):
            raise UsageError(f"{self.name}: {option} is {value:g}; choose 1 for yes or 0 for no")
        return bool(value)


Builder = Callable[[Any, ObjectiveOptions], Objective]  # (PairInfo, or None without a teacher model; options)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """The facts about an objective that potstill needs before it builds it.

    Attributes:
        name: the name on the command line.
        help: one line for error messages and lists.
        build: makes the objective from the pair of models and the options.
        cost: counts the additional cost of a pass.
        is_divergence: whether it compares the logits of both models by one function, row by row.
        uses_teacher: whether it needs any teacher.
        needs_teacher_model: whether it needs more than logits: the teacher's hidden states, weights or tokenizer.
        needs_only_last_hidden: whether the teacher's last hidden states and its head are enough; a cache can store
            these.
        supports_same_tokenizer: whether it works for a pair with one tokenizer.
        supports_cross_tokenizer: whether it works for a pair with two tokenizers.
        needs_edit_alignment: whether it needs pairs of rows of two tokenizers by minimum edit distance.
        takes_divergence: whether it has the option `divergence`.
        reads_language: whether it reads the language of each document, from the column that its option `column` names.
        rollout: the rollout that must write its text; empty if it needs none.
        networks: the frozen networks that it needs beside student and teacher, such as `reference`, or a function
            that gives them from the numeric options.
        data: what it trains on: text; preferences, pairs of answers; labels, single answers that are desirable or not;
            or prompts alone.
        numeric_options: the numbers that it takes, with their defaults.
        text_options: the options that are text.
    """

    name: str
    help: str
    build: Builder
    cost: CostFunction
    is_divergence: bool = False
    uses_teacher: bool = True
    needs_teacher_model: bool = True
    needs_only_last_hidden: bool = False
    supports_same_tokenizer: bool = True
    supports_cross_tokenizer: bool = False
    needs_edit_alignment: bool = False
    takes_divergence: bool = False
    reads_language: bool = False
    rollout: str = ""
    networks: tuple[str, ...] | Callable[[Mapping[str, float]], tuple[str, ...]] = ()
    data: TrainingData = "text"
    numeric_options: Mapping[str, float] = field(default_factory=dict)
    text_options: tuple[str, ...] = ()

    @property
    def option_names(self) -> set[str]:
        """Every option of the objective."""
        return {*self.numeric_options, *self.text_options, *([DIVERGENCE_OPTION] if self.takes_divergence else [])}


_specs: dict[str, ObjectiveSpec] = {}  # every registered objective, by name


def register_objective(name: str, *, help: str, cost: CostFunction, **facts: Any) -> Callable[[Builder], Builder]:
    """Decorate a builder to register an objective under `name`; `facts` are further fields of `ObjectiveSpec`.

    Raises: ValueError if two objectives have the same name.
    """

    def register(build: Builder) -> Builder:
        if name in _specs:
            raise ValueError(f"two objectives are called {name!r}")
        _specs[name] = ObjectiveSpec(name=name, help=help, build=build, cost=cost, **facts)
        return build

    return register


def list_registered_specs(module: str) -> tuple[ObjectiveSpec, ...]:
    """The objectives that the module of this full name registers, in the order of its file."""
    return tuple(spec for spec in _specs.values() if spec.build.__module__ == module)
