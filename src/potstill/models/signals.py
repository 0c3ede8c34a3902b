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
from potstill.models import isolation
from potstill.models.evaluating import evaluating
from potstill.ops import layout

EMBEDDINGS = "embeddings"
RELATIONS: Mapping[str, str] = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}  # and what makes each


@dataclass(frozen=True)
class Network:
    """What was found out about a model. It does not hold the model, which would then never be freed.

    Is its head explained, may its documents be packed, and does it take `position_ids` (ALiBi and recurrences do not)?
    """

    head_known: bool
    packs: bool
    placed: bool


_networks: "weakref.WeakKeyDictionary[nn.Module, Network]" = weakref.WeakKeyDictionary()


def network(model: nn.Module) -> Network:
    """`model` probed once: its head against its own logits, and the isolation of packed documents."""
    if model not in _networks:
        inner = plain(model)
        placed = "position_ids" in inspect.signature(inner.base_model.forward).parameters
        _networks[model] = Network(head_explains(inner), placed and isolation.install(inner), placed)
    return _networks[model]


def signals(model: nn.Module, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
    """The rows of `model` at `needs.positions`, in the order of the batch, with its head cut to `vocabulary` ids.

    Raises: UnsupportedModel where the model cannot give what is needed.
    """
    if needs.positions is None:
        raise ValueError("needs.positions is None: no row was asked for")
    if unknown := sorted(needs.relations - RELATIONS.keys() | needs.extras - {EMBEDDINGS}):
        raise UnsupportedModel(f"{type(model).__name__} gives no {unknown}")
    probed, inner = network(model), plain(model)
    if not probed.packs:
        return _signals_padded(probed, inner, batch, needs, vocabulary)
    inputs, asked_of = _evened(batch["input_ids"], batch["position_ids"], needs.positions)
    return _read(probed, inner, inputs, replace(needs, positions=asked_of), vocabulary)


def _evened(ids: Tensor, places: Tensor, asked: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a packed row is read from, with a last document that nothing is asked of, up to a round length."""
    longer = layout.evened(ids, dim=1)
    more = torch.arange(longer.shape[1] - ids.shape[1], device=ids.device).expand(len(ids), -1)
    return {"input_ids": longer, "position_ids": torch.cat([places, more], 1)}, layout.evened(asked, dim=1)


def _signals_padded(
    probed: Network, inner: PreTrainedModel, batch: Batch, needs: Needs, vocabulary: int | None
) -> Signals:
    """The same rows from documents laid one below another with padding, for a model that mixes packed documents."""
    padded = layout.unpack({**batch, "asked": needs.positions})  # type: ignore[dict-item]
    inputs = {"input_ids": padded["input_ids"], "attention_mask": (padded["documents"] >= 0).long()}
    if probed.placed:
        inputs["position_ids"] = padded["position_ids"]
    return _read(probed, inner, inputs, replace(needs, positions=padded["asked"].bool()), vocabulary)


def _read(
    probed: Network,
    inner: PreTrainedModel,
    inputs: dict[str, Tensor],
    needs: Needs,
    vocabulary: int | None,
) -> Signals:
    positions, layers = needs.positions, needs.layers
    assert positions is not None
    if not probed.head_known:
        if wanted := sorted(map(str, layers | needs.relations)):
            raise UnsupportedModel(f"{type(inner).__name__} shows its logits alone, and {wanted} were asked for")
        logits = inner(**inputs, use_cache=False).logits[positions]
        cut = logits if vocabulary is None else logits[:, :vocabulary]
        return Signals(rows=cut, logits=lambda rows: rows)
    with _related(inner, needs.relations) as related:
        output = inner.base_model(**inputs, use_cache=False, output_hidden_states=bool(layers))
    head = head_of(inner)
    head = head if vocabulary is None else head.real(vocabulary)
    hidden = {layer: output.hidden_states[layer][positions] for layer in layers}
    extras = {EMBEDDINGS: _embeddings(inner, inputs["input_ids"], positions)} if needs.extras else {}
    relations = {name: states[positions] for name, states in related.items()}
    rows = output.last_hidden_state[positions]
    return Signals(rows, partial(_logits, head), head, layers=hidden, relations=relations, extras=extras)


def _logits(head: Head, rows: Tensor) -> Tensor:
    """The logits of `rows`; with a gradient as they come, since that of a slice would be as large again."""
    return head.logits(rows) if rows.requires_grad else layout.through(head.logits, rows)


def _embeddings(inner: PreTrainedModel, ids: Tensor, positions: Tensor) -> Float[Tensor, "N 2 D"]:
    """The input embeddings of each row's own token and of the one after it."""
    pairs = torch.stack([ids[positions], ids.roll(-1, dims=1)[positions]], dim=1)
    found: Tensor = inner.get_input_embeddings()(pairs)
    return found


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """What makes the queries, keys and values of the last attention layer.

    Raises: UnsupportedModel where no layer has one of its own for each.
    """
    layers = [layer for layer in plain(model).modules() if all(hasattr(layer, own) for own in RELATIONS.values())]
    if not layers:
        raise UnsupportedModel(
            f"{type(plain(model)).__name__} has no attention with queries, keys and values projected apart; choose a "
            f"teacher that has, such as a Llama or a Qwen, or another objective"
        )
    return {name: getattr(layers[-1], own) for name, own in RELATIONS.items()}


@contextmanager
def _related(inner: PreTrainedModel, asked: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """What the asked projections give in a forward inside."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output))
        for name, module in (projections(inner).items() if asked else ())
        if name in asked
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def plain(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, adapters inside it included, below a peft wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    inner: PreTrainedModel = model if unwrap is None else unwrap()
    return inner


def head_of(model: nn.Module) -> Head:
    """The output layer with the scale and soft-cap that the family applies to its logits.

    Raises: UnsupportedModel if the model has no output layer.
    """
    inner = plain(model)
    output, config = inner.get_output_embeddings(), inner.config.get_text_config()
    if output is None:
        raise UnsupportedModel(f"{type(model).__name__} has no language-model head")
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(output.weight, getattr(output, "bias", None), float(scale), softcap)


def known_head(model: nn.Module) -> Head:
    """The head of a frozen model as a constant, which stays where it is when the model is moved.

    Raises: UnsupportedModel where it does not explain the model's logits.
    """
    if not network(model).head_known:
        raise UnsupportedModel(f"no head explains the logits of {type(model).__name__}; learn from it live")
    return head_of(model).constant()


@torch.no_grad()
def head_explains(model: PreTrainedModel, *, seed: int = 0) -> bool:
    """Whether `head_of(model)` applied to the last hidden states gives the logits that the model gives itself."""
    ids = probe_ids(model, length=8, seed=seed).to(next(model.parameters()).device)
    try:
        with evaluating(model):
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
            rows = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = head_of(model).logits(rows).float()
    except (AttributeError, TypeError, UnsupportedModel):
        return False
    tolerance = 16 * torch.finfo(rows.dtype).eps * theirs.abs().max().clamp(min=1)
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= tolerance)


def probe_ids(model: PreTrainedModel, *, length: int, seed: int) -> Int[Tensor, "1 T"]:
    """Random token ids that this model can read."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.get_text_config().vocab_size, (1, length), generator=generator)
