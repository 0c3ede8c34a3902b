"""What an alignment will read, train and write, as plain data: `--dry-run`. No model is loaded."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from potstill.core.device import resolve_device
from potstill.core.errors import UnsupportedModel
from potstill.core.types import MINUS, PLUS, REFERENCE
from potstill.models.quantization import check_trainable
from potstill.models.spec import ModelSpec
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.stages.align.align_data import AlignData
from potstill.stages.align.caches import open_caches
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.data import read_data
from potstill.stages.align.resources import build_workload, count_available_tokens, count_run_tokens, resolve_settings
from potstill.stages.dataset import load_tokenizer
from potstill.stages.dry_run import describe_shape, describe_text, leave_untouched, locate, read_spec
from potstill.stages.option_checks import check_single_process
from potstill.stages.resources.activation_memory import measure_autograd_bytes
from potstill.stages.resources.estimate import measure_tokenizer_bytes
from potstill.stages.resources.machine import get_available_resources
from potstill.stages.resources.report import check_disk
from potstill.stages.run_folder import reserve_output
from potstill.stages.run_models import choose_dtype
from potstill.stages.run_notes import report_passes
from potstill.stages.text_options import prepare_tokenizer
from potstill.teachers.cached import CacheFolder


def preview_align(config: AlignConfig, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """The models, the data, the steps, and the memory and disk in bytes of `config` in `out`.

    Raises: as `align` does before it loads a model; ArtifactError for a full disk.
    """
    check_single_process()
    options = config.to_dict()
    with reserve_output(
        out, config.inputs, overwrite=overwrite, resume=resume, options=options, recover=leave_untouched
    ):
        report = describe_run(config, out)
        check_disk((report["disk"] or {}).get("most", 0.0), get_available_resources(out, torch.device("cpu")).disk, out)
    return report


def describe_run(config: AlignConfig, out: Path, data: AlignData | None = None) -> dict[str, Any]:
    """The models, the data, the steps, and the memory and disk in bytes of `config` in `out`, without weights.

    The shape, memory and disk are None where no blueprint describes the model. `data` is that of the run if it has been
    read.
    """
    check_trainable(config.model, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
    caches = open_caches(config)
    specs = read_specs(config, caches)
    data = data or preview_data(config, specs)
    resources = estimate_resources(config, specs, caches, data, out) if specs else {}
    settings = resolve_settings(config, data.packs)
    available = count_available_tokens(config, data.packs)
    tokens = count_run_tokens(config, data.packs)
    report_passes(config.settings, available)
    frozen = {name: getattr(config, name) for name in (REFERENCE, PLUS, MINUS)}
    return {
        "stage": config.to_dict(),
        "out": str(out),
        "model": {"model": locate(config.model), **resources.get("model", {})},
        **{name: place for name, place in frozen.items() if place is not None},
        "objective": config.objective,
        "data": {**describe_data(data.facts), "measured_on": data.evaluator.subject},
        "training": {
            "tokens": tokens,
            "steps": settings.steps,
            "passes": tokens / available,
            **({"prompts_per_step": settings.packs_per_step} if config.loss.data == "prompts" else {}),
        },
        "memory": resources.get("memory"),
        "disk": resources.get("disk"),
    }


def preview_data(config: AlignConfig, specs: Mapping[str, ModelSpec]) -> AlignData:
    """The data as the tokenizer of the policy reads it."""
    tokenizer = specs["model"].tokenizer if specs else load_tokenizer(config.model)
    prepare_tokenizer(tokenizer, config)
    return read_data(config, tokenizer)


def describe_data(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a run from the facts of its card, with the number of prompts, or of pairs or answers with labels."""
    text = describe_text(facts)
    hidden = ("documents", "trained_share") if "prompts" in facts else ("documents",)
    count = {"prompts": facts["prompts"]} if "prompts" in facts else {"preferences": facts["preferences"]["groups"]}
    return {name: value for name, value in text.items() if name not in hidden} | count


def read_specs(config: AlignConfig, skip: Collection[str]) -> dict[str, ModelSpec]:
    """The policy under `model`, and the frozen models under their networks, without weights.

    It is empty where no blueprint describes one of them.
    """
    places = {"model": config.model, REFERENCE: config.reference, PLUS: config.plus, MINUS: config.minus}
    names = {network: name for network, name in places.items() if name is not None and network not in skip}
    try:
        return {network: read_spec(config, name) for network, name in names.items()}
    except UnsupportedModel:
        return {}


def estimate_resources(
    config: AlignConfig,
    specs: Mapping[str, ModelSpec],
    caches: Mapping[str, CacheFolder],
    data: AlignData,
    out: Path,
) -> dict[str, dict[str, Any]]:
    """The shape of the policy, and the memory and disk of a run in bytes, with what is free."""
    policy, tokenizer = specs["model"].blueprint, specs["model"].tokenizer
    dtype = choose_dtype(config, caches)
    frozen = {name: spec.blueprint for name, spec in specs.items() if name != "model"}
    work = build_workload(config, policy, frozen, data.packs, vocabulary=count_token_ids(tokenizer), dtype=dtype)
    memory = work.memory_bytes(measure_autograd_bytes(policy, dtype=dtype, lora=config.lora))
    available = get_available_resources(out, resolve_device(config.device))
    return {
        "model": describe_shape(policy),
        "memory": {"peak": sum(memory.values()), "free": available.memory},
        "disk": {**work.disk_bytes(measure_tokenizer_bytes(tokenizer)), "free": available.disk},
    }
