"""Short forwards on random tokens that show a model's positions, and which tokens a token can see."""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.models.dense_experts import dense_experts
from potstill.models.eval_mode import eval_mode

PROBE_LENGTH = 12
MAX_MOVE = 2  # eps of the dtype, relative to the largest value: what rounding alone may move
MAX_DIFFERENCE = 0.05  # of the largest value: in bf16 64 eps would allow half of it


def make_probe_ids(model: PreTrainedModel, *, length: int, seed: int) -> Int[Tensor, "1 T"]:
    """Random token ids on the CPU that this model can read, without the padding token."""
    config, generator = model.config.get_text_config(), torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (1, length), generator=generator)
    pad_id = getattr(config, "pad_token_id", None)
    # A model that derives positions from `input_ids != pad` (RoBERTa) gives a padding token none.
    return ids if pad_id is None else ids.where(ids != pad_id, 3 if pad_id != 3 else 4)


def make_cache_options(module: nn.Module) -> dict[str, bool]:
    """`use_cache=False` if the forward of `module` takes it; an encoder may not."""
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if takes_any or "use_cache" in parameters else {}


def make_probe_inputs(model: PreTrainedModel, ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
    """The inputs of a forward on `ids`; an encoder-decoder gets a fixed source, and its decoder reads `ids`."""
    if not is_encoder_decoder(model):
        return {"input_ids": ids}
    source = make_probe_ids(model, length=PROBE_LENGTH, seed=1).to(ids.device).expand(len(ids), -1)
    return {"input_ids": source, "decoder_input_ids": ids}


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether the model reads a source with an encoder and predicts with a decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


@torch.no_grad()
def compute_hidden_states(
    model: PreTrainedModel, ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None = None
) -> Float[Tensor, "B T D"]:
    """The last hidden states in eval mode; without `position_ids` the model makes its own."""
    inputs: dict[str, Any] = make_probe_inputs(model, ids) | make_cache_options(model.base_model)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    with eval_mode(model):
        if model.base_model is not model:
            return model.base_model(**inputs).last_hidden_state
        output = model(**inputs, output_hidden_states=True)  # headless, or T5, whose base model is itself
    return get_hidden_states(output)[-1]


def get_hidden_states(output: Any) -> tuple[Tensor, ...]:
    """The hidden states of every layer in a model's output; for an encoder-decoder, of its decoder."""
    states: tuple[Tensor, ...] | None = getattr(output, "decoder_hidden_states", None)
    return output.hidden_states if states is None else states


def compute_move(before: Tensor, after: Tensor) -> float:
    """The largest change of a value, in eps of its dtype, relative to the largest value."""
    scale = before.abs().max().double().clamp(min=torch.finfo(before.dtype).tiny)
    return float((after - before).abs().max().double() / scale / torch.finfo(before.dtype).eps)


def is_unmoved(before: Tensor, after: Tensor) -> bool:
    """Whether no value moved by more than 2 eps of its dtype, relative to the largest value."""
    return compute_move(before, after) <= MAX_MOVE


def is_close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of sums: within 64 eps of the largest value, at most 5 % of it."""
    return bool((a - b).abs().max() <= min(64 * torch.finfo(b.dtype).eps, MAX_DIFFERENCE) * b.abs().max())


def sees_no_later_token(model: PreTrainedModel, *, seed: int = 0) -> bool:
    """Whether the hidden states of a token do not change when a later token changes."""
    ids, other_ids = (make_probe_ids(model, length=PROBE_LENGTH, seed=seed + n) for n in range(2))
    half = PROBE_LENGTH // 2
    changed_ids = torch.cat([ids[:, :half], other_ids[:, half:]], 1)
    with dense_experts(model):
        before, after = (compute_hidden_states(model, row.to(model.device)) for row in (ids, changed_ids))
    if not before.isfinite().all():
        return True  # weights that give NaN tell nothing of causality; training says that they are NaN
    return is_unmoved(before[:, :half], after[:, :half])


def find_position_offset(model: PreTrainedModel) -> int | None:
    """The position of a model's first token: 0, or `pad_token_id + 1` in RoBERTa and similar models.

    None if the model takes no `position_ids` (ALiBi, recurrences), or no known offset gives its own hidden states.
    """
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return None
    ids = make_probe_ids(model, length=PROBE_LENGTH, seed=0).to(model.device)
    position_ids = torch.arange(PROBE_LENGTH, device=ids.device)[None]
    expected = compute_hidden_states(model, ids)
    pad_id = getattr(model.config.get_text_config(), "pad_token_id", None)
    for offset in (0, *([] if pad_id is None else [pad_id + 1])):
        try:
            hidden = compute_hidden_states(model, ids, position_ids + offset)
        except (IndexError, RuntimeError):  # a position beyond the model's table
            continue
        if is_unmoved(expected, hidden):
            return offset
    return None
