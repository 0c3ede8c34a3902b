"""The memory and disk of an alignment, compared with what the machine has."""

from collections.abc import Mapping
from pathlib import Path

import torch

from potstill.core.blueprint import Blueprint
from potstill.core.device import SAVE_DTYPES
from potstill.core.errors import UnsupportedModel
from potstill.core.memory import trim_memory
from potstill.core.types import REFERENCE
from potstill.data.packing import Packs
from potstill.models.families.registry import read_blueprint
from potstill.models.load import LoadedModel
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prompts import count_group_tokens
from potstill.stages.align.validation import get_policy_options
from potstill.stages.console import print_note
from potstill.stages.resources.dataset_stats import PackingStats, compute_packing_stats
from potstill.stages.resources.report import report_workload
from potstill.stages.resources.workload import FLOAT32_BYTES, Workload
from potstill.stages.run_notes import report_passes
from potstill.train import distributed
from potstill.train.config import TrainConfig

SAMPLING_NOTE = "the estimate does not include the time that the model takes to sample answers"


def build_workload(
    config: AlignConfig,
    policy: Blueprint,
    frozen: Mapping[str, Blueprint],
    packs: Packs,
    *,
    vocabulary: int,
    dtype: torch.dtype,
) -> Workload:
    """The sizes of a run; `frozen` are the models that are read beside the policy, by the name of their network.

    A reference counts as a teacher: its forward pass costs as much, and it takes four bytes a weight, or none where it
    is the policy without its adapter.
    """
    networks = [name for name in config.loss.networks if not (name == REFERENCE and config.reference_cache)]
    teachers = [frozen.get(name, policy) for name in networks]
    own_reference = REFERENCE in networks and REFERENCE not in frozen
    teacher_bytes = FLOAT32_BYTES if REFERENCE in networks else dtype.itemsize
    return Workload(
        teacher=teachers[0] if teachers else policy,
        student=policy,
        more_teachers=tuple(teachers[1:]),
        vocabulary=vocabulary,
        settings=resolve_settings(config, packs),
        packing=compute_stats(config, packs),
        source="live" if teachers else "alone",
        lora=config.lora,
        train=config.train,
        shards=distributed.world_size() if config.settings.shard else 1,
        compute_bytes=dtype.itemsize,
        teacher_bytes=0 if not teachers or (own_reference and config.lora) else teacher_bytes,
        saved_bytes=SAVE_DTYPES[config.save_dtype].itemsize,
        objective=config.loss,
    )


def resolve_settings(config: AlignConfig, packs: Packs) -> TrainConfig:
    """The settings with the tokens of a run; of prompts, each step trains on its samples as the objective says."""
    return config.settings.resolve_epochs(len(packs), updates=get_updates(config))


def get_updates(config: AlignConfig) -> int | None:
    """The number of optimizer steps that train on the samples of one step; None where nothing is sampled in groups."""
    return get_policy_options(config.loss).updates if config.loss.data == "prompts" else None


def count_run_tokens(config: AlignConfig, packs: Packs) -> int:
    """The tokens that a run trains on: of prompts, what their answers may take in whole steps."""
    if config.loss.data != "prompts":
        return config.settings.count_tokens(packs.num_tokens)
    return resolve_settings(config, packs).tokens or 0


def count_available_tokens(config: AlignConfig, packs: Packs) -> int:
    """The tokens of one pass over the data: of prompts, what their answers may take in all updates of whole steps."""
    updates, settings = get_updates(config), config.settings
    if updates is None:
        return packs.num_tokens
    return len(packs) // settings.packs_per_step * settings.packs_per_step * settings.context * updates


def compute_stats(config: AlignConfig, packs: Packs) -> PackingStats:
    """The statistics of the packs that are trained on: of prompts, with the longest answers that they may get."""
    if config.loss.data != "prompts":
        return compute_packing_stats(packs)
    prompt_tokens, answer_tokens = packs.num_tokens / len(packs), config.max_tokens
    group_tokens = count_group_tokens(prompt_tokens, config.samples, answer_tokens)
    trained = config.samples * answer_tokens / group_tokens
    return PackingStats(min(1.0, group_tokens / config.settings.context), trained, prompt_tokens + answer_tokens / 2)


def warn_if_insufficient(
    config: AlignConfig,
    policy: LoadedModel,
    frozen_models: Mapping[str, LoadedModel],
    packs: Packs,
    dtype: torch.dtype,
    out: Path,
    *,
    show: bool = True,
) -> None:
    """Print the passes over the data, and the memory and disk that a run takes; without `show`, only too little memory.

    Prints no memory for a family that no blueprint expresses.

    Raises: ArtifactError if the disk has too little room.
    """
    report_passes(config.settings, count_available_tokens(config, packs))
    if config.loss.required_rollout:
        print_note(SAMPLING_NOTE)
    try:
        blueprint = read_blueprint(policy.model.config)
        frozen = {name: read_blueprint(model.model.config) for name, model in frozen_models.items()}
    except UnsupportedModel:
        return
    trim_memory()
    work = build_workload(config, blueprint, frozen, packs, vocabulary=policy.vocabulary, dtype=dtype)
    report_workload(work, out, tokenizer=policy.tokenizer, device=policy.model.device, dtype=dtype, show=show)
