"""The gated feed-forward of each layer, and the activations of its neurons.

    y = a W_d,   a = act(h W_g) * (h W_u)   [T F]      (arXiv:2002.05202, Eq. 6)

A neuron is a coordinate of a. The activations are the input of the matrix that goes down, so a hook there reads them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel
from potstill.models.eval_mode import eval_mode
from potstill.models.hooks import temporary_hooks
from potstill.models.layer_view import find_layers

GATED_FORMS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("gate", "up", "down"))


def find_down_projections(model: PreTrainedModel) -> list[nn.Module]:
    """The module of each layer whose input is a, in the order of the layers.

    Raises: UnsupportedModel for a layer without a gated feed-forward, or with several, as experts are.
    """
    name = type(model).__name__
    projections = []
    for index, layer in enumerate(find_layers(model)[1]):
        gated = [module for module in layer.modules() if _find_down(module) is not None]
        if len(gated) != 1:
            kind = "no gated feed-forward" if not gated else f"{len(gated)} gated feed-forwards"
            raise UnsupportedModel(
                f"layer {index} of {name} has {kind}, and edits change the neurons of one; choose a dense model with "
                f"gated feed-forwards, such as a Llama, Qwen, Mistral or Gemma"
            )
        down = _find_down(gated[0])
        assert down is not None
        projections.append(down)
    return projections


@torch.no_grad()
def read_activations(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Float[Tensor, "B L F"]:
    """The activations a of each layer at the last token of each text of token ids, in float32, in eval mode.

    Raises: UnsupportedModel without gated feed-forwards, if they differ in width, or if some tokens skip a layer.
    """
    ids = pad_texts(texts, device=model.device)
    index = torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])
    rows: dict[int, Tensor] = {}

    def make_hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0].shape[:-1] == ids.shape:
                rows[layer] = inputs[0][index].float()

        return hook

    projections = find_down_projections(model)
    handles = [module.register_forward_pre_hook(make_hook(layer)) for layer, module in enumerate(projections)]
    with eval_mode(model), temporary_hooks(handles):
        model(input_ids=ids, use_cache=False)
    name = type(model).__name__
    if len(rows) < len(projections):
        raise UnsupportedModel(f"tokens skip layers of {name}, so they have no neurons there; choose another model")
    if len({row.shape for row in rows.values()}) > 1:
        raise UnsupportedModel(f"the layers of {name} differ in their number of neurons; choose a model of one width")
    return torch.stack([rows[layer] for layer in range(len(projections))], 1)


def pad_texts(texts: Sequence[Sequence[int]], *, device: torch.device) -> Int64[Tensor, "B T"]:
    """The texts as rows that end in token 0, which no token before it sees in a causal model."""
    return pad_sequence([torch.tensor(list(text)) for text in texts], batch_first=True).to(device)


def _find_down(module: nn.Module) -> nn.Module | None:
    """The matrix that goes down, if a module is a gated feed-forward."""
    for names in GATED_FORMS:
        parts = [getattr(module, name, None) for name in names]
        if all(isinstance(part, nn.Module) for part in parts):
            down: nn.Module | None = parts[-1]
            return down
    return None
