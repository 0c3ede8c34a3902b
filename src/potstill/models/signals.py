"""Computes the signals of any local network: decoder, encoder, encoder-decoder, classifier or task model.

The rows of a network are the inputs of its output layer. The head of a family may scale (Cohere, Granite) or soft-cap
(Gemma) its logits; a fused loss that ignores this trains toward another distribution. So potstill compares the head
with the model's own logits once. If no head gives those logits, it refuses the model as a student; as a teacher, the
model gives its logits as rows.
"""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel
from potstill.core.types import SOURCE, Batch, Head, Needs, Signals, SignalSource, get_view, select_needed_documents
from potstill.models import packed_attention
from potstill.models.embedding_noise import noisy_embeddings, select_noise
from potstill.models.eval_mode import eval_mode
from potstill.models.hooks import temporary_hooks
from potstill.models.output_layer import (
    capture_output_rows,
    find_output_layer,
    find_output_rows,
    is_same_logits,
    read_head,
    select_rows,
)
from potstill.models.probing import (
    compute_hidden_states,
    find_position_offset,
    get_hidden_states,
    is_encoder_decoder,
    make_cache_options,
    make_probe_ids,
    make_probe_inputs,
    sees_no_later_token,
)
from potstill.models.reports import get_reports, list_reports, make_report_arguments
from potstill.ops import layout

EMBEDDINGS = "embeddings"
RELATIONS = ("queries", "keys", "values")
PROJECTION_NAMES = (  # of queries, keys and values, as families name them
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
CROSS_ATTENTION_NAMES = ("cross", "encoder_attn", "EncDecAttention")


@dataclass(frozen=True)
class ModelProbe:
    """Facts about a model from short forwards. It has no reference to the model, which could then never be freed.

    `has_known_head`: a linear head, perhaps scaled and capped, makes the logits from the rows. `transforms_rows`: a
    transform, a scale or a pooler makes the rows from the last hidden states. `takes_position_ids`: ALiBi and
    recurrences do not. `position_offset` is the first position of a document. `supports_shared_prompts`: continuations
    see their prompt (`core.types`); for any other model, each continuation repeats it.
    """

    has_known_head: bool
    supports_packing: bool
    takes_position_ids: bool
    transforms_rows: bool = False
    position_offset: int = 0
    is_causal: bool = True
    supports_shared_prompts: bool = False

    @property
    def has_head_on_hidden_states(self) -> bool:
        """Whether the head makes the logits from the last hidden states of the base model."""
        return self.has_known_head and not self.transforms_rows


_probes: "weakref.WeakKeyDictionary[nn.Module, ModelProbe]" = weakref.WeakKeyDictionary()


def probe_model(model: nn.Module) -> ModelProbe:
    """The facts about `model`, computed at the first call: its head, its positions, packing and causality."""
    if model not in _probes:
        inner = unwrap_model(model)
        offset, on_hidden_states = find_position_offset(inner), is_head_reproduced(inner)
        rows = None if on_hidden_states else _find_transformed_rows(inner)
        can_pack = (
            offset is not None
            and (rows is None or rows.ndim == 3)
            and packed_attention.install_packed_attention(inner, position_offset=offset)
        )
        is_packed = can_pack and packed_attention.is_packed_attention(inner)
        _probes[model] = ModelProbe(
            has_known_head=on_hidden_states or rows is not None,
            supports_packing=can_pack,
            takes_position_ids=offset is not None,
            transforms_rows=rows is not None,
            position_offset=offset or 0,
            is_causal=is_packed or sees_no_later_token(inner),
            supports_shared_prompts=can_pack and packed_attention.is_prompt_shared(inner, position_offset=offset or 0),
        )
    return _probes[model]


def copy_probe(model: nn.Module, view: nn.Module) -> None:
    """Gives `view`, a copy of the model or some of its layers, the facts of `model`, if they are known already."""
    if model in _probes:
        _probes[view] = _probes[model]


def compute_signals(model: nn.Module, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
    """The rows of `model` at `needs.positions`, in the order of the batch, with its head cut to `vocabulary` ids.

    A module with a method `signals` computes them itself. An encoder-decoder encodes the batch's `source.*`; its rows
    are those of the decoder. Where the model cannot share prompts, each continuation repeats its prompt.

    Raises: UnsupportedModel if the model cannot give a needed signal.
    """
    if needs.positions is None:
        raise ValueError("needs.positions is None: name the positions whose rows are needed")
    if isinstance(model, SignalSource):
        return model.signals(batch, needs, vocabulary=vocabulary)
    known_extras = list_reports(unwrap_model(model)) | {EMBEDDINGS}
    if unknown_names := sorted((needs.relations - set(RELATIONS)) | (needs.extras - known_extras)):
        raise UnsupportedModel(f"{type(model).__name__} gives no {unknown_names}; choose another objective")
    probe, inner = probe_model(model), unwrap_model(model)
    positions = needs.positions
    if is_encoder_decoder(inner):
        inputs, positions = _make_encoder_decoder_inputs(batch, positions)
    else:
        if not probe.supports_shared_prompts:
            batch, positions = _repeat_prompts(batch, positions)
        make_inputs = _make_packed_inputs if probe.supports_packing else _make_padded_inputs
        inputs, positions = make_inputs(probe, batch, positions)
    return _compute_inner_signals(probe, inner, inputs, replace(needs, positions=positions), vocabulary)


def _repeat_prompts(batch: Batch, positions: Tensor) -> tuple[Batch, Tensor]:
    """The batch and positions with a copy of the prompt in each continuation; a prompt without needed rows goes."""
    repeated = layout.repeat_prompts({**batch, "positions": positions})
    if repeated["positions"] is positions or not bool(positions.any()):
        return repeated, repeated["positions"]
    repeated, needs = select_needed_documents(repeated, Needs(repeated["positions"]))
    assert needs.positions is not None
    return repeated, needs.positions


def _make_packed_inputs(probe: ModelProbe, batch: Batch, positions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of a packed row and its positions, with a last document of padding up to a round length."""
    input_ids = layout.pad_to_multiple(batch["input_ids"], dim=1)
    num_rows, num_tokens = batch["input_ids"].shape
    padding = torch.arange(input_ids.shape[1] - num_tokens, device=input_ids.device).expand(num_rows, -1)
    position_ids = torch.cat([batch["position_ids"], padding], 1) + probe.position_offset
    inputs = {"input_ids": input_ids, "position_ids": position_ids}
    inputs |= {name: layout.pad_to_multiple(values, dim=1) for name, values in select_noise(batch).items()}
    return inputs, layout.pad_to_multiple(positions, dim=1)


def _make_padded_inputs(probe: ModelProbe, batch: Batch, positions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of padded rows, one document a row, for a model that would mix packed documents."""
    padded_batch = layout.unpack({**batch, "positions": positions})
    inputs = {"input_ids": padded_batch["input_ids"], "attention_mask": (padded_batch["documents"] >= 0).long()}
    inputs |= select_noise(padded_batch)
    if probe.takes_position_ids:
        inputs["position_ids"] = padded_batch["position_ids"] + probe.position_offset
    return inputs, padded_batch["positions"].bool()


def _make_encoder_decoder_inputs(batch: Batch, positions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of both sides as padded rows: source n, read by the encoder, belongs to document n."""
    source = get_view(batch, SOURCE) if f"{SOURCE}.input_ids" in batch else None
    if source is None:
        raise UnsupportedModel(
            "an encoder-decoder reads a source; give the batch source.input_ids, source.position_ids and "
            "source.documents"
        )
    source, target = layout.unpack(source), layout.unpack({**_drop_prefixed(batch), "positions": positions})
    if len(source["input_ids"]) != len(target["input_ids"]):
        counts = f"{len(source['input_ids'])} sources for {len(target['input_ids'])} documents"
        raise UnsupportedModel(f"the batch has {counts}; give each document its source")
    inputs = {
        "input_ids": source["input_ids"],
        "attention_mask": (source["documents"] >= 0).long(),
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": (target["documents"] >= 0).long(),
    }
    return inputs, target["positions"].bool()


def _drop_prefixed(batch: Batch) -> Batch:
    return {name: values for name, values in batch.items() if "." not in name}


def _compute_inner_signals(
    probe: ModelProbe,
    inner: PreTrainedModel,
    inputs: dict[str, Tensor],
    needs: Needs,
    vocabulary: int | None,
) -> Signals:
    positions, layers, is_headless = needs.positions, needs.layers, find_output_layer(inner) is None
    assert positions is not None
    report_names = needs.extras - {EMBEDDINGS}
    module = inner.base_model if is_headless or probe.has_head_on_hidden_states else inner
    capture = _capture_transformed_rows(inner) if probe.transforms_rows else nullcontext([])
    noise = noisy_embeddings(inner, inputs)
    with _capture_projections(inner, needs.relations) as projection_outputs, capture as output_rows, noise:
        options = make_cache_options(module) | ({"output_hidden_states": True} if layers else {})
        output = module(**inputs, **options, **make_report_arguments(inner, report_names))
    hidden = {layer: get_hidden_states(output)[layer][positions] for layer in layers}
    token_ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    extras = get_reports(output, report_names, positions)
    if EMBEDDINGS in needs.extras:
        extras[EMBEDDINGS] = _compute_embeddings(inner, token_ids, positions)
    relations = {name: _select_projections(states, positions) for name, states in projection_outputs.items()}
    make_signals = partial(Signals, layers=hidden, relations=relations, extras=extras)
    if not probe.has_known_head:
        if is_headless:
            return make_signals(output.last_hidden_state[positions], partial(_refuse_logits, type(inner).__name__))
        logits = select_rows(output.logits, positions)
        return make_signals(logits if vocabulary is None else logits[:, :vocabulary], lambda rows: rows)
    head = get_head(inner)
    head = head if vocabulary is None else head.crop_vocabulary(vocabulary)
    rows = select_rows(output_rows[0], positions) if output_rows else output.last_hidden_state[positions]
    return make_signals(rows, partial(_compute_logits, head), head)


def _capture_transformed_rows(inner: PreTrainedModel) -> AbstractContextManager[list[Tensor]]:
    """The inputs of the output layer, without logits over a vocabulary.

    It computes the few logits of a classifier, because its forward may pool them.
    """
    return capture_output_rows(inner, skip_logits=inner.get_output_embeddings() is not None)


def _refuse_logits(name: str, rows: Tensor) -> NoReturn:
    raise UnsupportedModel(f"{name} has no output layer and so no logits; load it with a head")


def _compute_logits(head: Head, rows: Tensor) -> Tensor:
    """The logits of `rows`; with a gradient it does not slice them, because a slice's gradient would double the
    memory."""
    return head.logits(rows) if rows.requires_grad else layout.apply_padded(head.logits, rows)


def _compute_embeddings(inner: PreTrainedModel, ids: Tensor, positions: Tensor) -> Float[Tensor, "N 2 D"]:
    """The input embeddings of each row's own token and of the next token."""
    pair_ids = torch.stack([ids[positions], ids.roll(-1, dims=1)[positions]], dim=1)
    embeddings: Tensor = inner.get_input_embeddings()(pair_ids)
    return embeddings


def find_projections(model: nn.Module) -> dict[str, nn.Module]:
    """The projections to the queries, keys and values of the last self-attention layer.

    Raises: UnsupportedModel if no layer has a separate projection for each.
    """
    inner = unwrap_model(model)
    for name, layer in reversed([*inner.named_modules()]):
        if any(cross_name in name for cross_name in CROSS_ATTENTION_NAMES):
            continue
        for attributes in PROJECTION_NAMES:
            projections = [getattr(layer, attribute, None) for attribute in attributes]
            if all(isinstance(projection, nn.Module) for projection in projections):
                return dict(zip(RELATIONS, projections, strict=True))  # type: ignore[arg-type]
    raise UnsupportedModel(
        f"{type(inner).__name__} has no attention with separate projections to queries, keys and values; choose "
        f"another objective, or a teacher with such attention, such as a Llama or a Qwen"
    )


def _select_projections(states: Float[Tensor, "B T W"], positions: Bool[Tensor, "B T"]) -> Float[Tensor, "N W"]:
    """The projections at `positions`. Raises: UnsupportedModel if some tokens skip the layer and have none."""
    if states.shape[:2] != positions.shape:
        raise UnsupportedModel(
            "tokens skip the last attention layer, so its queries, keys and values cannot be compared; choose another "
            "objective, or convert other layers with depths:layers=..."
        )
    return states[positions]


@contextmanager
def _capture_projections(inner: PreTrainedModel, names: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward leaves the output of each named projection."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, module in (find_projections(inner).items() if names else ())
        if name in names
    ]
    with temporary_hooks(hooks):
        yield outputs


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model below a peft wrapper, with the adapters inside it."""
    get_base_model = getattr(model, "get_base_model", None)
    inner: PreTrainedModel = model if get_base_model is None else get_base_model()
    return inner


def get_head(model: nn.Module) -> Head:
    """The output layer with the scale and soft-cap that the family applies to its logits.

    Raises: UnsupportedModel if the model has no output layer.
    """
    return read_head(unwrap_model(model))


def get_constant_head(model: nn.Module) -> Head:
    """The head of a frozen model as a constant, which does not move with the model.

    Raises: UnsupportedModel if it does not give the model's logits.
    """
    if not probe_model(model).has_known_head:
        raise UnsupportedModel(f"no head gives the logits of {type(model).__name__}; use the model instead of a cache")
    return get_head(model).detach()


@torch.no_grad()
def is_head_reproduced(model: PreTrainedModel, *, seed: int = 0) -> bool:
    """Whether `get_head(model)`, applied to the last hidden states, gives the model's own logits."""
    ids = make_probe_ids(model, length=8, seed=seed).to(next(model.parameters()).device)
    try:
        with eval_mode(model):
            logits = model(**make_probe_inputs(model, ids), **make_cache_options(model)).logits[0]
        rows = compute_hidden_states(model, ids)[0]
        return is_same_logits(logits, get_head(model).logits(rows))
    except (AttributeError, TypeError, RuntimeError, UnsupportedModel):
        return False


def _find_transformed_rows(model: PreTrainedModel) -> Tensor | None:
    """The input of the output layer on random tokens, if the head makes the model's logits from it; else None."""
    try:
        return find_output_rows(model, get_head(model))
    except (AttributeError, TypeError, RuntimeError, UnsupportedModel):
        return None


def is_output_layer_reproduced(model: PreTrainedModel) -> bool:
    """Whether `get_head(model)`, applied to the input of the output layer, gives the model's own logits."""
    return is_head_reproduced(model) or _find_transformed_rows(model) is not None
