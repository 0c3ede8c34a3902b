"""Read everything that an alignment needs: caches, models, data; and build what is trained."""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from potstill.core.card import BEFORE_TRAINING, Parent
from potstill.core.device import resolve_device
from potstill.core.measure import Measure
from potstill.core.types import REFERENCE
from potstill.evaluate.measures import measure_size
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import check_token_id
from potstill.stages.align.align_data import AlignData
from potstill.stages.align.caches import check_caches, describe_files, list_parents, open_caches
from potstill.stages.align.checks import NUM_PACKS, AlignCheckInputs, run_checks
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.data import read_data
from potstill.stages.align.policy import load_policy
from potstill.stages.align.prompt_sampling import sample_packs
from potstill.stages.align.references import build_networks, load_frozen_models
from potstill.stages.align.resources import warn_if_insufficient
from potstill.stages.align.rollouts import build_rollout
from potstill.stages.run_models import choose_dtype, load_run_model, make_trainable, read_text_origins
from potstill.stages.samples import count_sample_tokens, write_samples
from potstill.stages.stage import make_parent
from potstill.stages.text_options import prepare_tokenizer
from potstill.stages.training_run import TrainingRun
from potstill.teachers.cached import CacheFolder
from potstill.train import distributed
from potstill.train.dropout import disable_dropout
from potstill.train.frozen_view import FrozenView
from potstill.train.rollouts.grouped import GroupedRollout
from potstill.train.training_module import TrainingModule


@dataclass(frozen=True, kw_only=True)
class AlignRun(TrainingRun):
    """An alignment with its policy, frozen networks and data in memory.

    `origin` is the policy, and `frozen_models` are the models that are read beside it, by the name of their network.
    """

    config: AlignConfig
    prepared: AlignData
    frozen_models: Mapping[str, LoadedModel]

    @property
    def measuring_status(self) -> str:
        """The line that is shown while the policy is measured."""
        return f"measuring on {self.prepared.evaluator.subject}"

    def connections(self) -> AbstractContextManager[None]:
        """Nothing is held open."""
        return contextlib.nullcontext()

    def warn_if_insufficient(self, out: Path, *, show: bool) -> None:
        """Print the memory and disk that the run takes, the reference included."""
        warn_if_insufficient(self.config, self.origin, self.frozen_models, self.packs, self.dtype, out, show=show)

    @property
    def prefers_chosen(self) -> bool:
        """False with `swap=1`."""
        return not any(part.term.numeric_options.get("swap") for part in self.config.loss.terms)

    def measure_baseline(self) -> list[Measure]:
        """The policy before training; compared with itself where no reference is in memory."""
        has_reference = REFERENCE in self.module.frozen_networks
        view = FrozenView(self.module.student, self.dtype)
        module = self.module if has_reference else self.module.with_frozen({REFERENCE: view})
        return self.prepared.evaluator.measure(module)

    def run_checks(self) -> list[dict[str, str]]:
        """Checks that packing, the loss of a copy, and accumulation are right for this policy and these data."""
        if self.config.skip_doctor:
            return [{"name": "invariants", "outcome": "not examined, by --skip-doctor"}]
        return run_checks(self.config.loss.data, self.make_check_inputs())

    def make_check_inputs(self) -> AlignCheckInputs:
        """What the checks read: the packs, or answers that the policy samples to the first prompts."""
        if not isinstance(self.rollout, GroupedRollout):
            return AlignCheckInputs(module=self.module, policy=self.origin, packs=self.packs)
        return AlignCheckInputs(
            module=self.module,
            policy=self.origin,
            packs=sample_packs(self.rollout, self.module, count=NUM_PACKS),
            temperature=self.rollout.sampler.policy.temperature,
        )

    def measure(self, student: LoadedModel) -> Mapping[str, Sequence[Measure]]:
        """The trained policy, compared with the reference of its training, or else with the model before training."""
        module = self.module.with_student(student.model)
        if not self._has_lasting_reference:
            module = module.with_frozen({REFERENCE: self._model_before_training.model})
        return {student.name: [*self.prepared.evaluator.measure(module), *measure_size(student)]}

    def write_samples(self, student: LoadedModel) -> str:
        """What the policy wrote before training, and writes now."""
        return write_samples({BEFORE_TRAINING: self._model_before_training, student.name: student})

    def check_samples(self) -> None:
        """Render the prompts of the samples with the template of the policy."""
        count_sample_tokens([self.origin])

    @property
    def _has_lasting_reference(self) -> bool:
        """Whether a reference is in memory that training and the merging of adapters leave as it is."""
        reference = self.module.frozen_networks.get(REFERENCE)
        return reference is not None and not isinstance(reference, FrozenView)

    @cached_property
    def _model_before_training(self) -> LoadedModel:
        """The policy before training: the frozen copy of it, or else read again."""
        copied = self.module.frozen_models_by_name.get(REFERENCE)
        if copied is not None and REFERENCE not in self.frozen_models:
            return replace(self.origin, model=copied.float())  # it mixes two dtypes, which decoding refuses
        loaded = load_run_model(self.config, self.config.model)
        loaded.model.to(resolve_device(self.config.device))
        return replace(loaded, tokenizer=self.origin.tokenizer)


def prepare(config: AlignConfig, resume_folder: Path | None = None) -> AlignRun:
    """Read caches, models and data, refuse what does not fit together, and build what is trained.

    The policy trains without dropout, so that it and its reference agree at the start. `resume_folder` is the folder of
    a run that is continued; it keeps the dtype that it began with.

    Raises: UsageError, NotFound, DataError, VocabularyMismatch, CacheMismatch, ArtifactError, UnsupportedModel.
    """
    caches = open_caches(config)
    dtype = distributed.broadcast_from_main(choose_dtype(config, caches, resume_folder=resume_folder))
    policy = load_policy(config)
    frozen_models = load_frozen_models(config, policy, skip=caches)
    origins = read_text_origins(caches, resume_folder=resume_folder)
    text_facts = prepare_tokenizer(policy.tokenizer, config, origins=origins)
    data = read_data(config, policy.tokenizer)
    check_token_id(int(data.packs.input_ids.max()), len(policy.model.get_input_embeddings().weight), policy.tokenizer)
    check_caches(config, caches, policy, data, dtype)
    module = build_module(config, policy, frozen_models, caches, dtype=dtype)
    return AlignRun(
        config=config,
        module=module,
        student=policy.model,
        origin=policy,
        packs=data.packs,
        validation=data.validation_packs,
        dtype=dtype,
        parents=list_all_parents(policy, frozen_models, caches),
        data={**data.facts, **text_facts},
        data_digest=data.digest,
        run_facts={**describe_files(caches), **data.run_facts},
        text_facts=text_facts,
        rollout=build_rollout(config, policy, data),
        prepared=data,
        frozen_models=frozen_models,
    )


def build_module(
    config: AlignConfig,
    policy: LoadedModel,
    frozen_models: Mapping[str, LoadedModel],
    caches: Mapping[str, CacheFolder],
    *,
    dtype: torch.dtype,
) -> TrainingModule:
    """The policy on its device as it is trained, the objective, and the frozen networks.

    Raises: as `make_trainable` and `build_networks` do.
    """
    policy.model.to(resolve_device(config.device))
    student: Any = make_trainable(config, policy.model)
    networks = build_networks(config, policy, student, frozen_models, caches, dtype=dtype)
    disable_dropout(student)
    student.to(policy.model.device)  # adapters too
    return TrainingModule(
        student, config.loss.build(), frozen=networks, vocabulary=policy.vocabulary, compute_dtype=dtype
    )


def list_all_parents(
    policy: LoadedModel, frozen_models: Mapping[str, LoadedModel], caches: Mapping[str, CacheFolder]
) -> list[Parent]:
    """The models of a run, for its card."""
    models = {"model before alignment": policy, **frozen_models}
    return [*(make_parent(role, model) for role, model in models.items()), *list_parents(caches)]
