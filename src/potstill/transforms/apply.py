"""The interface of a transform, and its application: pure functions rewrite an architecture and its weights.

Loading a transformed model repeats no transform, since its blueprint *is* the new architecture.
"""

from typing import Protocol, runtime_checkable

import torch

from potstill.core.blueprint import Blueprint
from potstill.core.types import Weights
from potstill.models.backbone import Backbone


@runtime_checkable
class Transform(Protocol):
    """Two pure functions: of a blueprint, and of the weights of a model with the blueprint `old`."""

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The new architecture."""
        ...

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The new architecture's weights."""
        ...


def apply_transform(transform: Transform, model: Backbone) -> Backbone:
    """A new model on the same device, in the same dtype and mode; `model` stays as it is and shares no memory with it.

    Raises:
        UsageError: the transform does not fit this blueprint.
        RuntimeError: the weights do not fit the new blueprint; the load is strict.
    """
    with torch.device("meta"):
        new_model = Backbone(transform.blueprint(model.blueprint))
    old_weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    weights = transform.weights(old_weights, model.blueprint)
    new_model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, strict=True, assign=True)
    new_model.gradient_checkpointing = model.gradient_checkpointing
    return new_model.train(model.training)
