"""One term of a loss: an objective by name with its options, and its weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from potstill.core.errors import UsageError
from potstill.core.suggestions import suggest
from potstill.core.types import Objective
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.registry import TEXT_OPTIONS, find_spec
from potstill.objectives.spec import DIVERGENCE_OPTION, ObjectiveOptions, ObjectiveSpec
from potstill.objectives.user_file import (
    DIGEST_OPTION,
    compute_digest,
    get_label,
    is_user_objective,
    load_divergence,
)
from potstill.ops.divergence import DIVERGENCES, Divergence, DivergenceFacts, get_facts


@dataclass(frozen=True, kw_only=True)
class ObjectiveTerm:
    """An objective by name, with the options that differ from its defaults.

    Raises: UsageError on first use, if there is no such objective.
    """

    name: str
    options: Mapping[str, float | str] = field(default_factory=dict)
    temperature: float = 1.0

    @cached_property
    def spec(self) -> ObjectiveSpec:
        """The spec of the objective."""
        return find_spec(self.name)

    @property
    def label(self) -> str:
        """The name of its terms in metrics."""
        return get_label(self.name)

    @property
    def text(self) -> str:
        """The term in the notation of the command line."""
        options = ",".join(f"{key}={_format_value(value)}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def with_digest(self) -> "ObjectiveTerm":
        """The same with the SHA-256 of a user's file among its options.

        Raises: UsageError if the options have another digest.
        """
        if not is_user_objective(self.name):
            return self
        digest = compute_digest(self.name)
        if self.options.get(DIGEST_OPTION, digest) != digest:
            raise UsageError(
                f"the file of {self.name} has the SHA-256 {digest}, and {self.options[DIGEST_OPTION]} is expected; "
                f"restore the file, or remove {DIGEST_OPTION}"
            )
        return replace(self, options={**self.options, DIGEST_OPTION: digest})

    @property
    def own_options(self) -> dict[str, float | str]:
        """The options without the digest of a file."""
        return {name: value for name, value in self.options.items() if name != DIGEST_OPTION}

    @property
    def numeric_options(self) -> dict[str, float]:
        """The numbers that the objective takes, with its defaults."""
        return {name: float(self.options.get(name, default)) for name, default in self.spec.numeric_options.items()}

    @property
    def networks(self) -> tuple[str, ...]:
        """The frozen networks that it needs beside student and teacher."""
        networks = self.spec.networks
        return networks if isinstance(networks, tuple) else networks(self.numeric_options)

    @property
    def text_options(self) -> dict[str, str]:
        """The texts that are given."""
        return {name: str(self.options[name]) for name in self.spec.text_options if name in self.options}

    @cached_property
    def divergence(self) -> Divergence:
        """The divergence of the term, or inside its method, with its options."""
        divergence = load_divergence(self.name) if is_user_objective(self.name) else DIVERGENCES.get(self.name)
        if divergence is None:
            return DIVERGENCES[str(self.options.get(DIVERGENCE_OPTION, "forward_kl"))]
        return partial(divergence, **self.own_options) if self.own_options else divergence

    @property
    def divergence_facts(self) -> DivergenceFacts:
        """The facts of the divergence."""
        return get_facts(self.divergence)

    def check(self) -> None:
        """Refuse unknown options and invalid values.

        Raises: UsageError.
        """
        option_names = self.spec.option_names
        if unknown_options := sorted(set(self.own_options) - option_names):
            name, names = unknown_options[0], sorted(option_names)
            raise UsageError(
                f"{self.name} has no option {name!r}{suggest(name, names)}; it has {', '.join(names) or 'none'}"
            )
        if (divergence_name := self.options.get(DIVERGENCE_OPTION, "forward_kl")) not in DIVERGENCES:
            hint = suggest(str(divergence_name), DIVERGENCES)
            raise UsageError(
                f"there is no divergence {divergence_name!r}{hint}; choose one of {', '.join(DIVERGENCES)}"
            )
        try:  # only the divergence knows which values it allows
            self.divergence(torch.zeros(1, 2), torch.zeros(1, 2))
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def build(self, pair: PairInfo | None) -> Objective:
        """The objective itself."""
        options = ObjectiveOptions(
            self.label, self.divergence, self.temperature, self.numeric_options, self.text_options
        )
        return self.spec.build(pair, options)

    def compute_cost(self, inputs: CostInputs) -> ObjectiveCost:
        """The additional cost of the term in a pass."""
        return self.spec.cost(replace(inputs, options={**self.numeric_options, **self.text_options}))


@dataclass(frozen=True, kw_only=True)
class WeightedTerm:
    """A term with its weight in the loss."""

    weight: float
    term: ObjectiveTerm

    @property
    def text(self) -> str:
        """The term in the notation of a sum."""
        return f"{_format_value(self.weight)}*{self.term.text}"


def parse_term(text: str, temperature: float = 1.0) -> ObjectiveTerm:
    """The term that `jsd:beta=0.3` or `my.py:my_kl:beta=0.3` describes.

    Raises: UsageError.
    """
    head, _, tail = text.partition(".py:")
    name, _, option_text = (tail or head).partition(":")
    name = f"{head}.py:{name}" if tail else name
    try:
        pairs = [pair.split("=") for pair in option_text.split(",") if pair]
        options = {key: value if _is_text_option(key) else float(value) for key, value in pairs}
    except ValueError as error:
        raise UsageError(f"objective {text!r} is not NAME or NAME:OPTION=NUMBER, such as jsd:beta=0.3") from error
    if len(options) < len(pairs):
        raise UsageError(f"objective {text!r} sets an option twice; set it once")
    return ObjectiveTerm(name=name, options=options, temperature=temperature)


def parse_weighted_term(text: str, temperature: float = 1.0) -> WeightedTerm:
    """The term that `0.5*jsd:beta=0.3` describes; without a weight, its weight is 1.

    Raises: UsageError.
    """
    weight, star, rest = text.partition("*")
    try:
        value = float(weight) if star else 1.0
    except ValueError as error:
        raise UsageError(f"the term {text!r} is not WEIGHT*OBJECTIVE, such as 0.5*jsd:beta=0.3") from error
    return WeightedTerm(weight=value, term=parse_term((rest if star else text).strip(), temperature))


def _is_text_option(name: str) -> bool:
    return name in (DIVERGENCE_OPTION, DIGEST_OPTION) or name in TEXT_OPTIONS


def _format_value(value: float | str) -> str:
    """The value as text that reads back as the same value."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))
