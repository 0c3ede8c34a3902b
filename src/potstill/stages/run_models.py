"""The models of a training run: how they are read, in which dtype they compute, and what of the student is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from potstill.core.atomic_files import TRAINING_FOLDER
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import CacheMismatch
from potstill.models.load import LoadedModel, load_model
from potstill.stages.run_record import RunRecord
from potstill.stages.text_options import DATE_ORIGIN
from potstill.teachers.cached import Manifest
from potstill.train import distributed
from potstill.train.activation_checkpointing import check_activation_checkpointing
from potstill.train.config import TrainConfig
from potstill.train.lora import add_adapters
from potstill.train.selection import select_parameters


@runtime_checkable
class ModelOptions(Protocol):
    """The options of a run that say how its models are read, and where they compute."""

    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def allow_pickle(self) -> bool: ...
    @property
    def trust_remote_code(self) -> bool: ...


@runtime_checkable
class StudentOptions(Protocol):
    """The options of a run that say what of the student is trained."""

    @property
    def settings(self) -> TrainConfig: ...
    @property
    def lora(self) -> int: ...
    @property
    def train(self) -> str | None: ...


@runtime_checkable
class Cache(Protocol):
    """A cache that takes the place of a network in training."""

    @property
    def manifest(self) -> Manifest: ...


def load_run_model(config: ModelOptions, name: str) -> LoadedModel:
    """A model of a run, under its options on pickled weights and remote code."""
    return load_model(name, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)


def choose_dtype(
    config: ModelOptions, caches: Mapping[str, Cache], *, resume_folder: Path | None = None
) -> torch.dtype:
    """The dtype of matrix products.

    With `auto`, a resumed run keeps the dtype that it began with, and a run that learns from a cache takes the cache's.
    """
    default_dtype = "auto"
    record = None if resume_folder is None else RunRecord.from_folder(resume_folder / TRAINING_FOLDER)
    if record is not None:
        default_dtype = str(record.origins["dtype"])
    elif caches:
        default_dtype = next(iter(caches.values())).manifest.facts.dtype
    return resolve_dtype(config.dtype, device_type=str(resolve_device(config.device)), default=default_dtype)


def read_text_origins(caches: Mapping[str, Cache], *, resume_folder: Path | None = None) -> dict[str, Any]:
    """The origins that hold the date which all chat templates of a run write: of the resumed run, or of its caches.

    Raises: CacheMismatch for caches of two dates.
    """
    record = None if resume_folder is None else RunRecord.from_folder(resume_folder / TRAINING_FOLDER)
    dates = {cache.manifest.facts.date for cache in caches.values()} - {""}
    if len(dates) > 1:
        raise CacheMismatch(
            f"the chat template writes the date, and the caches were made with {' and '.join(sorted(dates))}; make "
            f"them on one day"
        )
    origins = {DATE_ORIGIN: next(iter(dates), None)} if record is None else dict(record.origins)
    return distributed.broadcast_from_main(origins)


def make_trainable(config: StudentOptions, student: PreTrainedModel) -> Any:
    """The student as it is trained: with adapters, or with the parameters that `train` matches, or whole.

    Raises: UsageError if `train` matches no parameter; UnsupportedModel for activations that cannot be checkpointed.
    """
    model = add_adapters(student, config.lora, seed=config.settings.seed) if config.lora else student
    if config.train is not None:
        select_parameters(model, config.train)
    if config.settings.checkpoint_activations:
        check_activation_checkpointing(model)
    return model
