"""Objectives by name, as a command line, a recipe or a card says them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature

import torch

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.core.types import Objective
from potstill.objectives.combine import Sum
from potstill.objectives.distill import Distill
from potstill.objectives.language import CrossEntropy
from potstill.objectives.methods import MAP, METHODS, Asked
from potstill.objectives.several import Panel, combined
from potstill.objectives.sides import Sides
from potstill.ops.divergence import DIVERGENCES, Divergence

CROSS_ENTROPY = "cross_entropy"
INNER = "divergence"  # the option that names the divergence inside a method


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """share * cross-entropy + (1 - share) * what the teacher teaches, as a value.

    `name` is a divergence, a method of `objectives.methods`, or `cross_entropy` for no teacher at all, with options
    after a colon (`jsd:beta=0.3`, `dskdv2:divergence=reverse_kl`). The share of 0.7 is measured: there the student
    beats one trained by cross-entropy alone both in bits per byte and in its nearness to the teacher (LOG.md, "the
    share of cross-entropy").

    Raises: UsageError if the name, an option, the share or the temperature is none that exists.
    """

    name: str = "forward_kl"
    cross_entropy: float = 0.7
    temperature: float = 1.0
    options: Mapping[str, float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.cross_entropy <= 1:
            raise UsageError(f"the share of cross-entropy is {self.cross_entropy}; it lies between 0 and 1")
        if self.name not in names():
            raise UsageError(f"no objective is called {self.name!r}; choose one of {', '.join(names())}")
        if self.name == CROSS_ENTROPY and self.options:
            raise UsageError(f"{CROSS_ENTROPY} has no option {next(iter(self.options))!r}; it has none")
        if self.name != CROSS_ENTROPY:
            self._check_options()
            Distill(temperature=self.temperature)

    @classmethod
    def parse(cls, text: str, *, cross_entropy: float, temperature: float) -> "Mixture":
        """`jsd:beta=0.3` as a mixture."""
        name, _, rest = text.partition(":")
        try:
            pairs = [pair.split("=") for pair in rest.split(",") if pair]
            options = {key: value if key in (INNER, MAP) else float(value) for key, value in pairs}
        except ValueError as error:
            raise UsageError(f"objective {text!r} is not NAME or NAME:OPTION=NUMBER, such as jsd:beta=0.3") from error
        if len(options) < len(pairs):
            raise UsageError(f"objective {text!r} sets an option twice; set it once")
        return cls(name=name, cross_entropy=cross_entropy, temperature=temperature, options=options)

    @property
    def teaches(self) -> bool:
        """Whether a teacher is needed."""
        return self.name != CROSS_ENTROPY and self.cross_entropy < 1

    @property
    def alive(self) -> bool:
        """Whether the teacher's hidden states and weights are needed, which a server does not give."""
        return self.teaches and self.name in METHODS

    @property
    def recalled(self) -> bool:
        """Whether its last hidden states, which a cache may keep, and its head are all that is needed of these."""
        return self.alive and METHODS[self.name].recalled

    @property
    def across(self) -> bool:
        """Whether teacher and student may have different tokenizers."""
        return not self.teaches or (self.name in METHODS and METHODS[self.name].across)

    @property
    def warped(self) -> bool:
        """Whether rows of two tokenizers have to be paired by edit distance."""
        return self.alive and METHODS[self.name].warped

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers that a method takes, those that are left open by their defaults."""
        defaults = METHODS[self.name].options if self.name in METHODS else {}
        return {name: float(self.options.get(name, default)) for name, default in defaults.items()}

    @property
    def compared(self) -> Distill:
        """The divergence between rows of logits: the objective itself, or the one inside a method; else forward KL."""
        if self.name == CROSS_ENTROPY:
            return Distill()
        return Distill(divergence=self._divergence(), temperature=self.temperature, name=self.name)

    def build(self, sides: Sides | None = None, panel: Panel | None = None) -> Objective:
        """The objective itself; a method wants to know both `sides`. With a `panel`, of several teachers.

        Raises: VocabularyMismatch for tokenizers that it cannot compare.
        """
        if not self.teaches:
            return Sum((1.0, CrossEntropy()))
        taught = self._taught(sides) if panel is None else self._taught_by(panel)
        if self.cross_entropy == 0:
            return Sum((1.0, taught))
        return Sum((self.cross_entropy, CrossEntropy()), (1 - self.cross_entropy, taught))

    def require(self, *, alike: bool) -> None:
        """Refuse a pair of models with the same tokenizer, or with two, that the objective is not for.

        Raises: VocabularyMismatch with the objectives that are.
        """
        if alike or self.across:
            return
        able = ", ".join(name for name, method in METHODS.items() if method.across)
        raise VocabularyMismatch(
            f"teacher and student have different tokenizers, and {self.name} compares token by token; choose "
            f"--objective dskdv2_eta (or one of {able}), or a teacher with the student's tokenizer"
        )

    def _taught(self, sides: Sides | None) -> Objective:
        if self.name not in METHODS:
            return self.compared
        if sides is None:
            raise UsageError(f"{self.name} learns from a teacher's hidden states; give a teacher that is here")
        self.require(alike=sides.shared is not None)
        method = METHODS[self.name]
        texts = {name: str(self.options[name]) for name in method.texts if name in self.options}
        return method.build(sides, Asked(self.name, self._divergence(), self.temperature, self.numbers, texts))

    def _taught_by(self, panel: Panel) -> Objective:
        assert self.name not in METHODS  # `pipeline.teachers` has refused them
        part = Distill(divergence=self._divergence(), temperature=self.temperature)
        named = zip(panel.networks, panel.names, strict=True)
        return combined(panel, [replace(part, teacher=one, name=f"{self.name}.{name}") for one, name in named])

    def _divergence(self) -> Divergence:
        if self.name in METHODS:
            return DIVERGENCES[str(self.options.get(INNER, "forward_kl"))]
        divergence = DIVERGENCES[self.name]
        return partial(divergence, **self.options) if self.options else divergence

    def _check_options(self) -> None:
        if self.name in METHODS:
            method = METHODS[self.name]
            allowed = {*method.options, *method.texts, *([INNER] if method.divergence else [])}
        else:
            parameters = signature(DIVERGENCES[self.name]).parameters.values()
            allowed = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if unknown := sorted(set(self.options) - allowed):
            raise UsageError(f"{self.name} has no option {unknown[0]!r}; it has {', '.join(sorted(allowed)) or 'none'}")
        if (inner := self.options.get(INNER, "forward_kl")) not in DIVERGENCES:
            raise UsageError(f"no divergence is called {inner!r}; choose one of {', '.join(DIVERGENCES)}")
        try:  # what an option may be is known to the divergence alone
            self._divergence()(torch.zeros(1, 2), torch.zeros(1, 2))
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error


def names() -> tuple[str, ...]:
    """Everything that `--objective` takes."""
    return (CROSS_ENTROPY, *DIVERGENCES, *METHODS)
