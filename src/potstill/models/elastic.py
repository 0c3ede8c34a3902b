"""The sizes of an elastic model as Hugging Face models whose weights are views of the model's own weights.

Switching between sizes reads and copies nothing. Gradients of a size flow to the weights of the model.
"""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.elastic import Size, find_size, read_sizes
from potstill.core.errors import UnsupportedModel
from potstill.models.families.registry import make_model, name_weights, read_blueprint, read_weights
from potstill.models.signals import copy_probe


def get_sizes(model: PreTrainedModel) -> tuple[Size, ...]:
    """The sizes of a model, the largest first; none of a model that is not elastic.

    Raises: ArtifactError if its config describes them in another form.
    """
    try:
        return read_sizes(read_blueprint(model.config))
    except UnsupportedModel:
        return ()


class SizeView:
    """One size of `whole` as `model`, a stock model where a family expresses it.

    It has no weights of its own: `update` points it to those of `whole`.
    """

    def __init__(self, whole: PreTrainedModel, size: Size) -> None:
        self.whole, self.size = whole, size
        self.model = make_model(size.blueprint(read_blueprint(whole.config)), dtype=whole.dtype)
        self.model.generation_config = copy.deepcopy(whole.generation_config)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(whole.device)
        self.update()

    def update(self) -> PreTrainedModel:
        """The model with the present weights of `whole`, in its mode; with gradients on, they reach these weights."""
        blueprint, weights = read_weights(self.whole)
        part_weights = self.size.weights(weights, blueprint)
        for name, weight in name_weights(self.size.blueprint(blueprint), part_weights).items():
            _set_weight(self.model, name, weight)
        attention = self.whole.config._attn_implementation
        if self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        copy_probe(self.whole, self.model)
        return self.model.train(self.whole.training)


def slice_model(model: PreTrainedModel, share: float, *, name: str = "the model") -> PreTrainedModel:
    """The size called `share` of an elastic model, with views of its weights.

    They follow changes of the weights in place, such as those of an optimizer. After a change of dtype or device, slice
    again. `name` is that of the model in errors.

    Raises: UsageError if the model has no such size.
    """
    return SizeView(model, find_size(get_sizes(model), share, name)).model


def copy_size(model: PreTrainedModel, share: float, *, name: str = "the model") -> PreTrainedModel:
    """The size called `share` of an elastic model as a model of its own, which shares no memory with it.

    Raises: UsageError if the model has no such size.
    """
    view = slice_model(model, share, name=name)
    copies: dict[int, nn.Parameter] = {}  # by the view that it replaces, so that tied weights stay tied
    for module in view.modules():
        for weight_name, weight in module._parameters.items():
            if weight is not None:
                copies.setdefault(id(weight), nn.Parameter(weight.detach().clone()))
                module._parameters[weight_name] = copies[id(weight)]
    return view


def _set_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = weight  # type: ignore[assignment]
