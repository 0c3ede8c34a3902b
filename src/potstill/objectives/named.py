"""Objectives by name, as a command line, a recipe or a card says them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature

import torch

from potstill.core.errors import UsageError
from potstill.core.types import Objective
from potstill.objectives.combine import Sum
from potstill.objectives.distill import Distill
from potstill.objectives.language import CrossEntropy
from potstill.ops.divergence import DIVERGENCES, Divergence

CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """share * cross-entropy + (1 - share) * divergence(teacher, student), as a value.

    `name` is a divergence, with its options after a colon (`jsd:beta=0.3`), or `cross_entropy` for no teacher at all.
    The share of 0.7 is measured: there the student beats one trained by cross-entropy alone both in bits per byte and
    in its nearness to the teacher (LOG.md, "the share of cross-entropy").

    Raises: UsageError if the name, an option, the share or the temperature is none that exists.
    """

    name: str = "forward_kl"
    cross_entropy: float = 0.7
    temperature: float = 1.0
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.cross_entropy <= 1:
            raise UsageError(f"the share of cross-entropy is {self.cross_entropy}; it lies between 0 and 1")
        self.build()

    @classmethod
    def parse(cls, text: str, *, cross_entropy: float, temperature: float) -> "Mixture":
        """`jsd:beta=0.3` as a mixture."""
        name, _, rest = text.partition(":")
        try:
            options = {k: float(v) for k, v in (pair.split("=") for pair in rest.split(",") if pair)}
        except ValueError as error:
            raise UsageError(f"objective {text!r} is not NAME or NAME:OPTION=NUMBER, such as jsd:beta=0.3") from error
        return cls(name=name, cross_entropy=cross_entropy, temperature=temperature, options=options)

    @property
    def teaches(self) -> bool:
        """Whether a teacher is needed."""
        return self.name != CROSS_ENTROPY and self.cross_entropy < 1

    def build(self) -> Objective:
        """The objective itself."""
        if self.name not in (CROSS_ENTROPY, *DIVERGENCES):
            raise UsageError(f"no objective is called {self.name!r}; choose one of {', '.join(names())}")
        if self.name == CROSS_ENTROPY and self.options:
            raise UsageError(f"{CROSS_ENTROPY} has no option {next(iter(self.options))!r}; it has none")
        if not self.teaches:
            return Sum((1.0, CrossEntropy()))
        distill = Distill(divergence=self._divergence(), temperature=self.temperature, name=self.name)
        if self.cross_entropy == 0:
            return Sum((1.0, distill))
        return Sum((self.cross_entropy, CrossEntropy()), (1 - self.cross_entropy, distill))

    def _divergence(self) -> Divergence:
        divergence = DIVERGENCES[self.name]
        if not self.options:
            return divergence
        allowed = {p.name for p in signature(divergence).parameters.values() if p.kind is p.KEYWORD_ONLY}
        if unknown := sorted(set(self.options) - allowed):
            raise UsageError(f"{self.name} has no option {unknown[0]!r}; it has {', '.join(sorted(allowed)) or 'none'}")
        chosen = partial(divergence, **self.options)
        try:
            chosen(torch.zeros(1, 2), torch.zeros(1, 2))  # what an option may be is known to the divergence alone
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error
        return chosen


def names() -> tuple[str, ...]:
    """Everything that `--objective` takes."""
    return (CROSS_ENTROPY, *DIVERGENCES)
