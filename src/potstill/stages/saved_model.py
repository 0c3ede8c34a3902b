"""The folder of a model that a stage made, and the proof that it reloads to the same logits."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from potstill.core.errors import ArtifactError
from potstill.decode.stop_tokens import list_stop_tokens
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel, load_model
from potstill.models.saving import save_model_folder


def save_model(
    model: PreTrainedModel,
    origin: LoadedModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Save a stock folder: weights in `dtype` (or those of `state_dict` alone), config, generation config, tokenizer.

    The generation config names every token that ends an answer, those of the chat template too.
    """
    model.generation_config = copy.deepcopy(origin.model.generation_config) or GenerationConfig()
    stop_tokens = list_stop_tokens(origin.model, origin.tokenizer)
    model.generation_config.eos_token_id = stop_tokens if len(stop_tokens) > 1 else next(iter(stop_tokens), None)
    save_model_folder(model, origin.tokenizer, folder, dtype=dtype, state_dict=state_dict)


@torch.no_grad()
def compute_reload_gap(model: PreTrainedModel, folder: Path, *, trust_remote_code: bool = False) -> float:
    """The largest difference between the logits of `model` and those of the model reloaded from `folder`.

    Raises:
        ArtifactError: it is more than rounding.
    """
    reloaded_model = load_model(folder, device=model.device, trust_remote_code=trust_remote_code).model.to(model.dtype)
    length = min(32, get_max_context(model))
    ids = torch.arange(3, 3 + length, device=model.device)[None] % model.config.vocab_size
    logits, reloaded_logits = (m.eval()(input_ids=ids, use_cache=False).logits for m in (model, reloaded_model))
    gap = float((logits - reloaded_logits).abs().max())
    if not gap <= 1e-4 * float(logits.abs().max()):
        raise ArtifactError(f"the reloaded model's logits differ by {gap:.3g}; nothing was kept, please report this")
    return gap


def save_checked_model(
    model: PreTrainedModel,
    origin: LoadedModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Save a model in `dtype` and reload it; the record that says that it reloads to the same logits.

    The weights of `model` have to be values of `dtype` (`round_weights`), so that what is measured is what is saved.
    Too little memory for a second copy is recorded, and the saved model stays.

    Raises: ArtifactError if it does not.
    """
    save_model(model, origin, folder, dtype=dtype)
    try:
        gap = compute_reload_gap(model, folder, trust_remote_code=trust_remote_code)
    except (MemoryError, torch.OutOfMemoryError):
        return {"name": "logits after reload", "outcome": "not compared: no memory for a second copy of the model"}
    return {"name": "logits after reload", "outcome": f"equal within {gap:.1e}"}
