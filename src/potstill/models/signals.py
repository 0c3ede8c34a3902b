"""What any Hugging Face causal language model says about a batch, with its head laid open.

The head of a family may scale (Cohere, Granite) or soft-cap (Gemma) its logits; a fused loss that ignores it trains
towards another distribution. So the head that `head_of` reads from the config is compared with the model's own logits
once; a model that it cannot explain is refused as a student and, as a teacher, gives its logits as rows.
"""

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel
from potstill.core.types import Batch, Head, Needs, Signals
from potstill.models import packed_attention
from potstill.models.eval_mode import eval_mode
from potstill.ops import layout

EMBEDDINGS = "embeddings"
RELATIONS: Mapping[str, str] = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}  # and what makes each


@dataclass(frozen=True)
class ModelProbe:
    """What was found out about a model. It does not hold the model, which would then never be freed.

    Is its head explained, may its documents be packed, and does it take `position_ids` (ALiBi and recurrences do not)?
    """

    has_known_head: bool
    supports_packing: bool
    takes_position_ids: bool


_probes: "weakref.WeakKeyDictionary[nn.Module, ModelProbe]" = weakref.WeakKeyDictionary()


def probe_model(model: nn.Module) -> ModelProbe:
    """`model` probed once: its head against its own logits, and the isolation of packed documents."""
    if model not in _probes:
        inner = unwrap_model(model)
        takes_position_ids = "position_ids" in inspect.signature(inner.base_model.forward).parameters
        _probes[model] = ModelProbe(
            is_head_reproduced(inner),
            takes_position_ids and packed_attention.install_packed_attention(inner),
            takes_position_ids,
        )
    return _probes[model]


def compute_signals(model: nn.Module, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
    """The rows of `model` at `needs.positions`, in the order of the batch, with its head cut to `vocabulary` ids.

    Raises: UnsupportedModel where the model cannot give what is needed.
    """
    if needs.positions is None:
        raise ValueError("needs.positions is None: no row was asked for")
    if unknown_names := sorted(needs.relations - RELATIONS.keys() | needs.extras - {EMBEDDINGS}):
        raise UnsupportedModel(f"{type(model).__name__} gives no {unknown_names}")
    probe, inner = probe_model(model), unwrap_model(model)
    if not probe.supports_packing:
        return _compute_padded_signals(probe, inner, batch, needs, vocabulary)
    inputs, positions = _pad_packed_row(batch["input_ids"], batch["position_ids"], needs.positions)
    return _compute_inner_signals(probe, inner, inputs, replace(needs, positions=positions), vocabulary)


def _pad_packed_row(input_ids: Tensor, position_ids: Tensor, positions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a packed row is read from, with a last document that nothing is asked of, up to a round length."""
    padded_ids = layout.pad_to_multiple(input_ids, dim=1)
    extra_positions = torch.arange(padded_ids.shape[1] - input_ids.shape[1], device=input_ids.device).expand(
        len(input_ids), -1
    )
    return {
        "input_ids": padded_ids,
        "position_ids": torch.cat([position_ids, extra_positions], 1),
    }, layout.pad_to_multiple(positions, dim=1)


def _compute_padded_signals(
    probe: ModelProbe, inner: PreTrainedModel, batch: Batch, needs: Needs, vocabulary: int | None
) -> Signals:
    """The same rows from documents laid one below another with padding, for a model that mixes packed documents."""
    padded_batch = layout.unpack({**batch, "asked": needs.positions})  # type: ignore[dict-item]
    inputs = {"input_ids": padded_batch["input_ids"], "attention_mask": (padded_batch["documents"] >= 0).long()}
    if probe.takes_position_ids:
        inputs["position_ids"] = padded_batch["position_ids"]
    return _compute_inner_signals(
        probe, inner, inputs, replace(needs, positions=padded_batch["asked"].bool()), vocabulary
    )


def _compute_inner_signals(
    probe: ModelProbe,
    inner: PreTrainedModel,
    inputs: dict[str, Tensor],
    needs: Needs,
    vocabulary: int | None,
) -> Signals:
    positions, layers = needs.positions, needs.layers
    assert positions is not None
    if not probe.has_known_head:
        if unavailable := sorted(map(str, layers | needs.relations)):
            raise UnsupportedModel(f"{type(inner).__name__} shows its logits alone, and {unavailable} were asked for")
        logits = inner(**inputs, use_cache=False).logits[positions]
        vocabulary_logits = logits if vocabulary is None else logits[:, :vocabulary]
        return Signals(rows=vocabulary_logits, logits=lambda rows: rows)
    with _capture_projections(inner, needs.relations) as projection_outputs:
        output = inner.base_model(**inputs, use_cache=False, output_hidden_states=bool(layers))
    head = get_head(inner)
    head = head if vocabulary is None else head.crop_vocabulary(vocabulary)
    hidden = {layer: output.hidden_states[layer][positions] for layer in layers}
    extras = {EMBEDDINGS: _compute_embeddings(inner, inputs["input_ids"], positions)} if needs.extras else {}
    relations = {name: states[positions] for name, states in projection_outputs.items()}
    rows = output.last_hidden_state[positions]
    return Signals(rows, partial(_compute_logits, head), head, layers=hidden, relations=relations, extras=extras)


def _compute_logits(head: Head, rows: Tensor) -> Tensor:
    """The logits of `rows`; with a gradient as they come, since that of a slice would be as large again."""
    return head.logits(rows) if rows.requires_grad else layout.apply_padded(head.logits, rows)


def _compute_embeddings(inner: PreTrainedModel, ids: Tensor, positions: Tensor) -> Float[Tensor, "N 2 D"]:
    """The input embeddings of each row's own token and of the one after it."""
    pair_ids = torch.stack([ids[positions], ids.roll(-1, dims=1)[positions]], dim=1)
    embeddings: Tensor = inner.get_input_embeddings()(pair_ids)
    return embeddings


def find_projections(model: nn.Module) -> dict[str, nn.Module]:
    """What makes the queries, keys and values of the last attention layer.

    Raises: UnsupportedModel where no layer has one of its own for each.
    """
    layers = [
        layer
        for layer in unwrap_model(model).modules()
        if all(hasattr(layer, attribute) for attribute in RELATIONS.values())
    ]
    if not layers:
        raise UnsupportedModel(
            f"{type(unwrap_model(model)).__name__} has no attention with queries, keys and values projected "
            f"apart; choose a "
            f"teacher that has, such as a Llama or a Qwen, or another objective"
        )
    return {name: getattr(layers[-1], attribute) for name, attribute in RELATIONS.items()}


@contextmanager
def _capture_projections(inner: PreTrainedModel, names: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """What the asked projections give in a forward inside."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, module in (find_projections(inner).items() if names else ())
        if name in names
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, adapters inside it included, below a peft wrapper."""
    get_base_model = getattr(model, "get_base_model", None)
    inner: PreTrainedModel = model if get_base_model is None else get_base_model()
    return inner


def get_head(model: nn.Module) -> Head:
    """The output layer with the scale and soft-cap that the family applies to its logits.

    Raises: UnsupportedModel if the model has no output layer.
    """
    inner = unwrap_model(model)
    output, config = inner.get_output_embeddings(), inner.config.get_text_config()
    if output is None:
        raise UnsupportedModel(f"{type(model).__name__} has no language-model head")
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(output.weight, getattr(output, "bias", None), float(scale), softcap)


def get_constant_head(model: nn.Module) -> Head:
    """The head of a frozen model as a constant, which stays where it is when the model is moved.

    Raises: UnsupportedModel where it does not explain the model's logits.
    """
    if not probe_model(model).has_known_head:
        raise UnsupportedModel(f"no head explains the logits of {type(model).__name__}; learn from it live")
    return get_head(model).detach()


@torch.no_grad()
def is_head_reproduced(model: PreTrainedModel, *, seed: int = 0) -> bool:
    """Whether `head_of(model)` applied to the last hidden states gives the logits that the model gives itself."""
    ids = make_probe_ids(model, length=8, seed=seed).to(next(model.parameters()).device)
    try:
        with eval_mode(model):
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            rows = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        head_logits = get_head(model).logits(rows).float()
    except (AttributeError, TypeError, UnsupportedModel):
        return False
    tolerance = 16 * torch.finfo(rows.dtype).eps * logits.abs().max().clamp(min=1)
    return logits.shape == head_logits.shape and bool((logits - head_logits).abs().max() <= tolerance)


def make_probe_ids(model: PreTrainedModel, *, length: int, seed: int) -> Int[Tensor, "1 T"]:
    """Random token ids that this model can read."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.get_text_config().vocab_size, (1, length), generator=generator)
