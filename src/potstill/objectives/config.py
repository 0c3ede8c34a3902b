"""Objectives by name, as a command line, a recipe or a card says them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature

import torch

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.core.types import Objective
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.model_info import PairInfo
from potstill.objectives.multi_teacher import TeacherEnsemble, combine_teachers
from potstill.objectives.registry import LAYER_MAP_OPTION, OBJECTIVE_SPECS, ObjectiveOptions
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.divergence import DIVERGENCES, Divergence

CROSS_ENTROPY = "cross_entropy"
DIVERGENCE_OPTION = "divergence"  # the option that names the divergence inside a method


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
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
        if self.name not in list_objective_names():
            raise UsageError(f"no objective is called {self.name!r}; choose one of {', '.join(list_objective_names())}")
        if self.name == CROSS_ENTROPY and self.options:
            raise UsageError(f"{CROSS_ENTROPY} has no option {next(iter(self.options))!r}; it has none")
        if self.name != CROSS_ENTROPY:
            self._check_options()
            LogitDistillation(temperature=self.temperature)

    @classmethod
    def parse(cls, text: str, *, cross_entropy: float, temperature: float) -> "ObjectiveConfig":
        """`jsd:beta=0.3` as a mixture."""
        name, _, option_text = text.partition(":")
        try:
            pairs = [pair.split("=") for pair in option_text.split(",") if pair]
            options = {
                key: value if key in (DIVERGENCE_OPTION, LAYER_MAP_OPTION) else float(value) for key, value in pairs
            }
        except ValueError as error:
            raise UsageError(f"objective {text!r} is not NAME or NAME:OPTION=NUMBER, such as jsd:beta=0.3") from error
        if len(options) < len(pairs):
            raise UsageError(f"objective {text!r} sets an option twice; set it once")
        return cls(name=name, cross_entropy=cross_entropy, temperature=temperature, options=options)

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher is needed."""
        return self.name != CROSS_ENTROPY and self.cross_entropy < 1

    @property
    def needs_teacher_model(self) -> bool:
        """Whether the teacher's hidden states and weights are needed, which a server does not give."""
        return self.uses_teacher and self.name in OBJECTIVE_SPECS

    @property
    def needs_only_last_hidden(self) -> bool:
        """Whether its last hidden states, which a cache may keep, and its head are all that is needed of these."""
        return self.needs_teacher_model and OBJECTIVE_SPECS[self.name].needs_only_last_hidden

    @property
    def supports_cross_tokenizer(self) -> bool:
        """Whether teacher and student may have different tokenizers."""
        return not self.uses_teacher or (
            self.name in OBJECTIVE_SPECS and OBJECTIVE_SPECS[self.name].supports_cross_tokenizer
        )

    @property
    def needs_edit_alignment(self) -> bool:
        """Whether rows of two tokenizers have to be paired by edit distance."""
        return self.needs_teacher_model and OBJECTIVE_SPECS[self.name].needs_edit_alignment

    @property
    def numeric_options(self) -> dict[str, float]:
        """The numbers that a method takes, those that are left open by their defaults."""
        defaults = OBJECTIVE_SPECS[self.name].numeric_options if self.name in OBJECTIVE_SPECS else {}
        return {name: float(self.options.get(name, default)) for name, default in defaults.items()}

    @property
    def logit_objective(self) -> LogitDistillation:
        """The divergence between rows of logits: the objective itself, or the one inside a method; else forward KL."""
        if self.name == CROSS_ENTROPY:
            return LogitDistillation()
        return LogitDistillation(divergence=self._build_divergence(), temperature=self.temperature, name=self.name)

    def build(self, pair: PairInfo | None = None, ensemble: TeacherEnsemble | None = None) -> Objective:
        """The objective itself; a method wants to know both `sides`. With a `panel`, of several teachers.

        Raises: VocabularyMismatch for tokenizers that it cannot compare.
        """
        if not self.uses_teacher:
            return WeightedSum((1.0, CrossEntropy()))
        teacher_objective = (
            self._build_teacher_objective(pair) if ensemble is None else self._build_multi_teacher_objective(ensemble)
        )
        if self.cross_entropy == 0:
            return WeightedSum((1.0, teacher_objective))
        return WeightedSum((self.cross_entropy, CrossEntropy()), (1 - self.cross_entropy, teacher_objective))

    def check_tokenizers(self, *, same_tokenizer: bool) -> None:
        """Refuse a pair of models with the same tokenizer, or with two, that the objective is not for.

        Raises: VocabularyMismatch with the objectives that are.
        """
        if same_tokenizer or self.supports_cross_tokenizer:
            return
        choices = ", ".join(name for name, spec in OBJECTIVE_SPECS.items() if spec.supports_cross_tokenizer)
        raise VocabularyMismatch(
            f"teacher and student have different tokenizers, and {self.name} compares token by token; choose "
            f"--objective dskdv2_eta (or one of {choices}), or a teacher with the student's tokenizer"
        )

    def _build_teacher_objective(self, pair: PairInfo | None) -> Objective:
        if self.name not in OBJECTIVE_SPECS:
            return self.logit_objective
        if pair is None:
            raise UsageError(f"{self.name} learns from a teacher's hidden states; give a teacher that is here")
        self.check_tokenizers(same_tokenizer=pair.num_shared_ids is not None)
        spec = OBJECTIVE_SPECS[self.name]
        text_options = {name: str(self.options[name]) for name in spec.text_options if name in self.options}
        return spec.build(
            pair,
            ObjectiveOptions(self.name, self._build_divergence(), self.temperature, self.numeric_options, text_options),
        )

    def _build_multi_teacher_objective(self, ensemble: TeacherEnsemble) -> Objective:
        assert self.name not in OBJECTIVE_SPECS  # `pipeline.teachers` has refused them
        part = LogitDistillation(divergence=self._build_divergence(), temperature=self.temperature)
        networks_and_names = zip(ensemble.networks, ensemble.names, strict=True)
        return combine_teachers(
            ensemble,
            [replace(part, teacher=network, name=f"{self.name}.{name}") for network, name in networks_and_names],
        )

    def _build_divergence(self) -> Divergence:
        if self.name in OBJECTIVE_SPECS:
            return DIVERGENCES[str(self.options.get(DIVERGENCE_OPTION, "forward_kl"))]
        divergence = DIVERGENCES[self.name]
        return partial(divergence, **self.options) if self.options else divergence

    def _check_options(self) -> None:
        if self.name in OBJECTIVE_SPECS:
            spec = OBJECTIVE_SPECS[self.name]
            option_names = {
                *spec.numeric_options,
                *spec.text_options,
                *([DIVERGENCE_OPTION] if spec.takes_divergence else []),
            }
        else:
            parameters = signature(DIVERGENCES[self.name]).parameters.values()
            option_names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if unknown_options := sorted(set(self.options) - option_names):
            raise UsageError(
                f"{self.name} has no option {unknown_options[0]!r}; it has {', '.join(sorted(option_names)) or 'none'}"
            )
        if (divergence_name := self.options.get(DIVERGENCE_OPTION, "forward_kl")) not in DIVERGENCES:
            raise UsageError(f"no divergence is called {divergence_name!r}; choose one of {', '.join(DIVERGENCES)}")
        try:  # what an option may be is known to the divergence alone
            self._build_divergence()(torch.zeros(1, 2), torch.zeros(1, 2))
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error


def list_objective_names() -> tuple[str, ...]:
    """Everything that `--objective` takes."""
    return (CROSS_ENTROPY, *DIVERGENCES, *OBJECTIVE_SPECS)
