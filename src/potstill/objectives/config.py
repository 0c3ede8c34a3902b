"""The objective of a command line, a recipe or a card, as plain values."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.core.language import LANGUAGE_COLUMN
from potstill.core.types import Objective
from potstill.objectives.cost import CostInputs, ObjectiveCost, sum_costs
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.model_info import PairInfo
from potstill.objectives.multi_teacher import TeacherEnsemble, combine_teachers
from potstill.objectives.options import ObjectiveChoice
from potstill.objectives.registry import OBJECTIVE_SPECS
from potstill.objectives.spec import TrainingData
from potstill.objectives.term import ObjectiveTerm, WeightedTerm, parse_term, parse_weighted_term
from potstill.objectives.weighted_sum import WeightedSum

PLUS = re.compile(r"(?<!\d[eE])\+")  # a plus that is not part of a number such as 1e+3
WEIGHT_PATTERN = re.compile(r"\s*[\d.]+(?:[eE][+-]?\d+)?\s*\*")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(ObjectiveChoice):
    """One objective with a share of cross-entropy, or a sum of weighted objectives.

    `name` is a divergence, a method of `objectives.registry`, `cross_entropy` (no teacher), or FILE.py:NAME for a
    user's own. `options` are its options. The loss is `cross_entropy` * cross-entropy + (1 - `cross_entropy`) * the
    objective. With the default share, a student has fewer bits per byte and a lower KL to the teacher than with
    cross-entropy alone (LOG.md, "the share of cross-entropy"). An objective of preferences or prompts has share 0.

    `name` can also be a sum such as `0.7*cross_entropy+0.3*forward_kl+0.01*balance`, options included. The sum is then
    the whole loss, and `cross_entropy` becomes the share of that term. `temperature` applies to every term.

    The options of FILE.py:NAME include the SHA-256 of the file.

    Raises: UsageError if name, options, share or temperature are invalid, or a file does not have its SHA-256.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.cross_entropy <= 1:
            raise UsageError(f"the share of cross-entropy is {self.cross_entropy}; choose it between 0 and 1")
        if self.is_sum:
            self._set_sum()
        else:
            term = ObjectiveTerm(name=self.name, options=self.options, temperature=self.temperature).with_digest()
            object.__setattr__(self, "options", term.options)
            object.__setattr__(self, "cross_entropy", self._choose_share(term))
        for named_term in self.named_terms:
            named_term.term.check()
        if self.name != CROSS_ENTROPY:
            LogitDistillation(temperature=self.temperature)

    def _choose_share(self, term: ObjectiveTerm) -> float:
        """The share of cross-entropy: 0 beside an objective that does not train on text.

        Raises: UsageError for another share beside such an objective.
        """
        if term.spec.data == "text":
            return self.cross_entropy
        if self.cross_entropy not in (ObjectiveChoice.cross_entropy, 0):
            raise UsageError(
                f"cross-entropy would train on rejected answers too; {term.name} takes no share of it, so omit it"
            )
        return 0.0

    def _set_sum(self) -> None:
        """Write the sum in one form, with the share of cross-entropy.

        Raises: UsageError if the sum contradicts other fields or itself.
        """
        terms = [replace(named, term=named.term.with_digest()) for named in self.named_terms]
        names = Counter(named.term.label for named in terms)
        if duplicates := [name for name, n in names.items() if n > 1]:
            raise UsageError(f"the objective {self.name!r} has two terms {duplicates[0]!r}; keep one of them")
        total = sum(named.weight for named in terms)
        if not 0 < total < math.inf or min(named.weight for named in terms) < 0:
            raise UsageError(f"the objective {self.name!r} needs weights of 0 or more, at least one above 0")
        share = sum(named.weight for named in terms if named.term.name == CROSS_ENTROPY) / total
        if self.cross_entropy not in (ObjectiveChoice.cross_entropy, share) or self.options:
            raise UsageError(
                f"the objective {self.name!r} states every weight and option itself; omit --cross-entropy, or give "
                "cross_entropy a weight in the sum"
            )
        object.__setattr__(self, "cross_entropy", share)
        object.__setattr__(self, "name", "+".join(named.text for named in terms))
        self.__dict__.pop("named_terms", None)

    @classmethod
    def parse(cls, text: str, *, cross_entropy: float, temperature: float) -> "ObjectiveConfig":
        """The objective that `jsd:beta=0.3`, `my.py:my_kl` or `0.5*forward_kl+0.5*hidden:layers=2` describes.

        Raises: UsageError.
        """
        if is_sum(text):
            return cls(name=text, cross_entropy=cross_entropy, temperature=temperature)
        term = parse_term(text, temperature)
        return cls(name=term.name, cross_entropy=cross_entropy, temperature=temperature, options=term.options)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "ObjectiveConfig":
        """The objective of a stage's options, with defaults for those that are absent.

        Raises: UsageError.
        """
        defaults = ObjectiveChoice()
        return cls.parse(
            options.get("objective", defaults.name),
            cross_entropy=options.get("cross_entropy", defaults.cross_entropy),
            temperature=options.get("temperature", defaults.temperature),
        )

    @property
    def text(self) -> str:
        """The objective in the notation of the command line, without the share of cross-entropy."""
        return self.name if self.is_sum else self.named_terms[0].term.text

    @property
    def is_sum(self) -> bool:
        """Whether the name is a sum of weighted objectives."""
        return is_sum(self.name)

    @cached_property
    def named_terms(self) -> tuple[WeightedTerm, ...]:
        """The objectives that the name states, with their weights."""
        if self.is_sum:
            return tuple(parse_weighted_term(part, self.temperature) for part in PLUS.split(self.name))
        term = ObjectiveTerm(name=self.name, options=self.options, temperature=self.temperature)
        return (WeightedTerm(weight=1.0, term=term),)

    @cached_property
    def terms(self) -> tuple[WeightedTerm, ...]:
        """The whole loss as weighted objectives, cross-entropy included."""
        if self.is_sum or self.name == CROSS_ENTROPY:
            return self.named_terms
        (named,) = self.named_terms
        cross_entropy = WeightedTerm(
            weight=self.cross_entropy, term=ObjectiveTerm(name=CROSS_ENTROPY, temperature=self.temperature)
        )
        parts = (cross_entropy, replace(named, weight=1 - self.cross_entropy))
        return tuple(part for part in parts if part.weight > 0)

    @property
    def teacher_terms(self) -> tuple[ObjectiveTerm, ...]:
        """The objectives that learn from a teacher."""
        return tuple(part.term for part in self.terms if part.term.spec.uses_teacher)

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss needs a teacher."""
        return bool(self.teacher_terms)

    @property
    def needs_teacher_model(self) -> bool:
        """Whether the loss needs more than the teacher's logits, such as its hidden states or weights."""
        return any(term.spec.needs_teacher_model for term in self.teacher_terms)

    @property
    def needs_only_last_hidden(self) -> bool:
        """Whether it needs more than logits, but the teacher's last hidden states (which a cache can store) are
        enough."""
        return self.needs_teacher_model and all(
            term.spec.needs_only_last_hidden or not term.spec.needs_teacher_model for term in self.teacher_terms
        )

    @property
    def supports_cross_tokenizer(self) -> bool:
        """Whether teacher and student may have different tokenizers."""
        return all(term.spec.supports_cross_tokenizer for term in self.teacher_terms)

    @property
    def needs_edit_alignment(self) -> bool:
        """Whether it needs pairs of rows of two tokenizers by minimum edit distance."""
        return any(term.spec.needs_edit_alignment for term in self.teacher_terms)

    @property
    def supports_partial_distributions(self) -> bool:
        """Whether the likeliest tokens and the total probability of all others give a lower bound of each
        divergence."""
        return all(
            term.spec.is_divergence and term.divergence_facts.is_f_divergence
            for term in self.teacher_terms
            if not term.spec.needs_teacher_model
        )

    @property
    def supports_sampled_tokens(self) -> bool:
        """Whether tokens drawn from the teacher give an unbiased gradient."""
        return all(
            term.spec.is_divergence and term.divergence_facts.supports_sampled_tokens for term in self.teacher_terms
        )

    @property
    def language_column(self) -> str | None:
        """The column of the data that names the language of each document; None if the loss reads none."""
        terms = (part.term for part in self.named_terms if part.term.spec.reads_language)
        return next((term.text_options.get("column", LANGUAGE_COLUMN) for term in terms), None)

    @property
    def networks(self) -> tuple[str, ...]:
        """The frozen networks that the loss needs beside student and teacher, such as `reference`."""
        return tuple(dict.fromkeys(name for part in self.terms for name in part.term.networks))

    @property
    def data(self) -> TrainingData:
        """What the loss trains on; a term that trains on text reads any data.

        Raises: UsageError for two terms that train on different data.
        """
        terms = [part.term for part in self.terms if part.term.spec.data != "text"]
        for term in terms[1:]:
            if term.spec.data != terms[0].spec.data:
                raise UsageError(
                    f"{terms[0].name} trains on {terms[0].spec.data} and {term.name} on {term.spec.data}; keep one of "
                    "them"
                )
        return terms[0].spec.data if terms else "text"

    @property
    def required_rollout(self) -> str:
        """The rollout that must sample the text; empty if the loss needs none."""
        return next((part.term.spec.rollout for part in self.named_terms if part.term.spec.rollout), "")

    @property
    def logit_objective(self) -> LogitDistillation:
        """The comparison of logits: the first divergence, else the one inside the first method, else forward KL."""
        terms = [part.term for part in self.named_terms if part.term.spec.uses_teacher]
        terms.sort(key=lambda term: term.spec.needs_teacher_model)
        if not terms:
            return LogitDistillation()
        return LogitDistillation(divergence=terms[0].divergence, temperature=self.temperature, name=terms[0].label)

    def build(self, pair: PairInfo | None = None, ensemble: TeacherEnsemble | None = None) -> Objective:
        """The objective, from `pair` (methods need it) or for the teachers of an `ensemble`.

        Raises: UsageError without a needed pair; VocabularyMismatch for tokenizers that the objective cannot compare.
        """
        return WeightedSum(*((part.weight, self._build_term(part.term, pair, ensemble)) for part in self.terms))

    def compute_cost(self, inputs: CostInputs) -> ObjectiveCost:
        """The additional cost of the loss over a pass of cross-entropy; `inputs` without options."""
        return sum_costs(part.term.compute_cost(inputs) for part in self.terms)

    def check_tokenizers(self, *, same_tokenizer: bool) -> None:
        """Refuse a pair of models with two tokenizers under an objective for one.

        Raises: VocabularyMismatch with the objectives that work.
        """
        unsupported = [term.name for term in self.teacher_terms if not term.spec.supports_cross_tokenizer]
        if same_tokenizer or not unsupported:
            return
        choices = ", ".join(
            name for name, spec in OBJECTIVE_SPECS.items() if spec.supports_cross_tokenizer and spec.uses_teacher
        )
        raise VocabularyMismatch(
            f"teacher and student have different tokenizers, and {unsupported[0]} compares token by token; choose "
            f"--objective dskdv2_eta (or one of {choices}), or a teacher with the student's tokenizer"
        )

    def _build_term(self, term: ObjectiveTerm, pair: PairInfo | None, ensemble: TeacherEnsemble | None) -> Objective:
        if ensemble is not None and term.spec.uses_teacher:
            return _combine(term, ensemble)
        if not term.spec.uses_teacher or not term.spec.needs_teacher_model:
            return term.build(None)
        if pair is None:
            raise UsageError(f"{term.name} learns from a teacher's hidden states; give a teacher on this machine")
        self.check_tokenizers(same_tokenizer=pair.num_shared_ids is not None)
        return term.build(pair)


def is_sum(text: str) -> bool:
    """Whether the text is a sum of weighted objectives, or one with a weight."""
    return WEIGHT_PATTERN.match(text) is not None or len(PLUS.split(text)) > 1


def _combine(term: ObjectiveTerm, ensemble: TeacherEnsemble) -> Objective:
    """The objective of all teachers, each with its own part of the same divergence.

    Raises: UsageError if the term is no divergence.
    """
    if not term.spec.is_divergence:
        raise UsageError(f"{term.name} is not a divergence, which several teachers need; choose --objective forward_kl")
    names = zip(ensemble.networks, ensemble.names, strict=True)
    part = LogitDistillation(divergence=term.divergence, temperature=term.temperature)
    return combine_teachers(
        ensemble, [replace(part, teacher=network, name=f"{term.label}.{name}") for network, name in names]
    )
