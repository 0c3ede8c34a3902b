"""Cut a model to a shape: units by their importance, layers by measured harm or evenly."""

from collections.abc import Sequence
from typing import Any

from potstill.core.types import Batch
from potstill.models.backbone import Backbone
from potstill.transforms.apply import apply_transform
from potstill.transforms.drop_layers import DropLayers, ablate_layers, select_evenly
from potstill.transforms.fit import Shape, get_shape
from potstill.transforms.importance import measure_importance, next_token_loss
from potstill.transforms.narrow import select_units


def shrink(
    model: Backbone, target: Shape, batches: Sequence[Batch], *, layers_by: str
) -> tuple[Backbone, dict[str, Any]]:
    """`model` at shape `target`, and the measurements behind it: width, then depth, as in MiniMA.

    Importance and harm are both measured on the whole model.
    """
    shape, decisions = get_shape(model.blueprint), {}
    num_layers, target_layers = shape["layers"], target["layers"]
    layers = tuple(range(num_layers))
    if target_layers < num_layers and layers_by == "harm":
        harm = ablate_layers(model, batches[:1], next_token_loss, target_layers, greedy=False)
        layers, decisions["harm"] = harm.keep, harm.to_dict()
    elif target_layers < num_layers:
        layers = select_evenly(num_layers, target_layers)
    sizes: dict[str, Any] = {name: size for name, size in target.items() if name != "layers" and size < shape[name]}
    if sizes:
        statistics = measure_importance(model, batches, next_token_loss)
        model = apply_transform(select_units(statistics, **sizes), model)
    if len(layers) < num_layers:
        model = apply_transform(DropLayers(layers), model)
    return model, {"kept_layers": list(layers), **decisions}
