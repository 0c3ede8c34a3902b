"""A stock folder, which transformers and vLLM open."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from potstill.core.blueprint import Layer
from potstill.core.device import SAVE_DTYPES
from potstill.core.errors import UnsupportedModel
from potstill.layers.ffn.experts import Experts
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model, find_family
from potstill.models.families.stacked_experts import SEPARATE_EXPERTS
from potstill.models.gguf_export.tensors import absorb_embedding_scale
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.load import LoadedModel
from potstill.models.saving import round_weights
from potstill.stages.export.shared import count_bytes
from potstill.stages.saved_model import save_checked_model


def export_hf(loaded: LoadedModel, folder: Path, *, save_dtype: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Write a stock folder, and compare the logits after a reload; the facts of the files and the check.

    Raises: UnsupportedModel for layers that no stock family has; UsageError for a weight beyond `save_dtype`.
    """
    model = make_stock_model(loaded.model)
    dtype = SAVE_DTYPES[save_dtype]
    round_weights(model, dtype)
    record = save_checked_model(model, loaded, folder, dtype=dtype, trust_remote_code=trust_remote_code)
    facts = {"type": save_dtype, "bytes": count_bytes(folder), "architecture": str(model.config.model_type)}
    return {"facts": facts, "checks": [record]}


def make_stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or potstill's own architecture as a stock family of the same function.

    A Gemma 3 that was pruned in width keeps the scale of its embedding. The weights take that scale, and the head gets
    weights of its own. Straight-through experts become normalized ones, whose values are the same, and separate ones
    are stacked.

    Raises: UnsupportedModel where no stock family has such layers.
    """
    if not isinstance(model, PotstillForCausalLM):
        return model
    weights = model.backbone.state_dict()
    blueprint = model.backbone.blueprint.change_layers(lambda _: True, _normalize_experts)
    blueprint = blueprint.update_extras({SEPARATE_EXPERTS: False})
    for scale in (blueprint.hidden**0.5, 1.0):
        candidate = replace(blueprint, embedding_scale=scale, tied=False)
        if find_family(candidate) is not None:
            stock = Backbone(candidate)
            state = absorb_embedding_scale(blueprint, weights, scale)
            stock.load_state_dict({"head.weight": state["embed.weight"], **state})
            return export_model(stock.eval(), model)
    raise UnsupportedModel(
        "no stock family has layers like these, so transformers and vLLM cannot open them; `potstill serve` serves them"
    )


def _normalize_experts(layer: Layer) -> Layer:
    if not isinstance(layer.ffn, Experts) or layer.ffn.weighting != "straight_through":
        return layer
    return replace(layer, ffn=replace(layer.ffn, weighting="normalized"))
