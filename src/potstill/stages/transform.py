"""What the stages that transform one model share: the model, its calibration text, and the checked folder."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.core.atomic_files import atomic_folder
from potstill.core.blueprint import Blueprint
from potstill.core.card import Card
from potstill.core.device import SAVE_DTYPES
from potstill.core.types import Batch
from potstill.data.row_reader import DocumentLabel
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel, load_model
from potstill.models.quantization import check_trainable
from potstill.models.saving import round_weights
from potstill.models.tokenizers.vocabulary import check_token_id
from potstill.stages.console import explain_write_errors
from potstill.stages.dataset import load_calibration_batches
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.model_card import write_card
from potstill.stages.options import ConvertOptions, PruneOptions
from potstill.stages.saved_model import save_checked_model
from potstill.stages.text_options import get_text_options

MAX_CONTEXT = 512  # tokens of a window of calibration text

TransformOptions = PruneOptions | ConvertOptions


def load_original(options: TransformOptions) -> LoadedModel:
    """The model to transform. Raises: UnsupportedModel for a quantized one; as `load_model` does."""
    check_trainable(options.model, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code)
    return load_model(options.model, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code)


def load_calibration_text(
    options: TransformOptions, loaded: LoadedModel, blueprint: Blueprint, *, label: DocumentLabel | None = None
) -> tuple[list[Batch], dict[str, Any]]:
    """The packed calibration text and its facts; with `label`, each document has the label of its row.

    Raises: DataError; VocabularyMismatch for a token without a row in the embedding.
    """
    dataset_config = DatasetConfig(
        **get_text_options(options),
        data=options.data,
        columns=options.columns,
        context=min(MAX_CONTEXT, get_max_context(loaded.model)),
        seed=options.seed,
        label=label,
    )
    batches, facts = load_calibration_batches(dataset_config, loaded.tokenizer, tokens=options.calibration_tokens)
    for batch in batches:
        check_token_id(int(batch["input_ids"].max()), blueprint.vocabulary, loaded.tokenizer)
    return list(batches), facts


def write_transformed_model(
    options: TransformOptions, model: PreTrainedModel, loaded: LoadedModel, card: Card, out: Path, *, overwrite: bool
) -> Card:
    """Saves, reloads and compares the logits; the folder appears only if all steps succeed. Returns its card.

    Raises: ArtifactError if the logits differ.
    """
    save_dtype = SAVE_DTYPES[options.save_dtype]
    round_weights(model, save_dtype)
    with explain_write_errors(out), atomic_folder(out, overwrite=overwrite) as folder:
        record = save_checked_model(
            model, loaded, folder, dtype=save_dtype, trust_remote_code=options.trust_remote_code
        )
        card = replace(card, invariants=[record])
        write_card(folder, card, title=out.name)
    return card


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A context in which matrices are multiplied in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
