"""Reads everything that training Medusa heads needs: the target, the text, and the target's own answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from potstill.core.device import get_dtype_name, resolve_device, resolve_dtype
from potstill.core.errors import UnsupportedModel
from potstill.core.screen import status
from potstill.decode.drafters.medusa import MedusaHeads
from potstill.evaluate.scoring_windows import Row
from potstill.evaluate.target_text import list_prompts, write_target_rows
from potstill.models.causality import require_causal
from potstill.models.load import LoadedModel, load_model
from potstill.models.signals import probe_model
from potstill.stages.dataset import PreparedDataset, load_held_out_corpus, prepare_dataset
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.medusa.config import MedusaConfig
from potstill.stages.run_models import read_text_origins
from potstill.stages.run_record import RunRecord
from potstill.stages.text_options import prepare_tokenizer


@dataclass(frozen=True, kw_only=True)
class MedusaRun:
    """A run with its target, heads and text in memory; `rows` are answers of the target to held-out prompts."""

    target: LoadedModel
    heads: MedusaHeads
    dataset: PreparedDataset
    rows: Sequence[Row]
    dtype: torch.dtype
    record: RunRecord


def prepare(config: MedusaConfig, resume_folder: Path | None = None) -> MedusaRun:
    """Read the target and the text, and make the heads; `resume_folder` is the folder of a run that is continued.

    Raises: UsageError, NotFound, DataError; UnsupportedModel for a target whose head is not on its last hidden states.
    """
    target = load_target(config)
    origins = read_text_origins({}, resume_folder=resume_folder)
    text_facts = prepare_tokenizer(target.tokenizer, config, origins=origins)
    dataset_config = DatasetConfig.from_training(config)
    dataset = prepare_dataset(
        dataset_config,
        target.tokenizer,
        tokens=config.settings.tokens,
        models=[target.model],
        documents=config.documents,
    )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device_type=str(device))
    target.move_to(device, dtype)
    target.model.requires_grad_(False)
    hidden = int(target.model.get_input_embeddings().weight.shape[1])
    origins = {"models": [["target", target.digest]], "text": dataset.digest, "dtype": get_dtype_name(dtype)}
    return MedusaRun(
        target=target,
        heads=MedusaHeads(hidden, config.num_heads).to(device),
        dataset=dataset,
        rows=write_rows(config, dataset_config, target),
        dtype=dtype,
        record=RunRecord(options=config.to_dict(), origins={**origins, **text_facts}),
    )


def load_target(config: MedusaConfig) -> LoadedModel:
    """The target, which has to be causal, and to make its logits from its last hidden states.

    Raises: NotFound, UnsupportedModel.
    """
    target = load_model(config.model, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
    require_causal(target.model, "the target")
    if not probe_model(target.model).has_head_on_hidden_states:
        raise UnsupportedModel(
            f"{type(target.model).__name__} has no known head on its last hidden states, which Medusa heads read; "
            f"choose another model"
        )
    return target


@status("writing the target's own answers")
def write_rows(config: MedusaConfig, dataset_config: DatasetConfig, target: LoadedModel) -> list[Row]:
    """The target's greedy answers to held-out prompts, on which the heads are measured."""
    prompts = list_prompts(
        load_held_out_corpus(dataset_config),
        target,
        limit=config.documents,
        max_new_tokens=config.max_tokens,
        special_in_text=config.special_in_text,
    )
    return write_target_rows(target, prompts, max_new_tokens=config.max_tokens)
