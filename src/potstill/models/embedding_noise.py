"""Adds noise to a model's input embeddings in one forward, where the batch has its keys and scales.

The trainer adds these keys to the batches that it trains on, and the training module gives them to the student alone.
So evaluations, frozen models and sampling are without noise.
"""

from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel
from potstill.core.types import NOISE_KEYS, NOISE_SCALES, STEP, Batch, SignalSource
from potstill.models.hooks import temporary_hooks
from potstill.ops.embedding_noise import compute_noise_scales, draw_noise, hash_tokens


def make_noise(batch: Batch, *, alpha: float, seed: int) -> dict[str, Tensor]:
    """The keys and scales of a batch's noise in the step that it is for; none for an `alpha` of 0."""
    if not alpha:
        return {}
    positions, documents = batch["position_ids"], batch["documents"]
    keys = hash_tokens(batch["input_ids"], positions, documents, seed=seed, step=int(batch[STEP]))
    return {NOISE_KEYS: keys, NOISE_SCALES: compute_noise_scales(positions, documents, alpha=alpha)}


def select_noise(batch: Batch) -> dict[str, Tensor]:
    """The keys and scales of a batch, by name; none where it has none."""
    return {name: batch[name] for name in (NOISE_KEYS, NOISE_SCALES) if name in batch}


def noisy_embeddings(model: PreTrainedModel, inputs: MutableMapping[str, Tensor]) -> AbstractContextManager[None]:
    """A context in which `model` adds the noise of `inputs` to its embeddings; takes the noise out of `inputs`."""
    noise = {name: inputs.pop(name) for name in (NOISE_KEYS, NOISE_SCALES) if name in inputs}
    if not noise:
        return nullcontext()

    def add_noise(_: nn.Module, __: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        values = draw_noise(noise[NOISE_KEYS], noise[NOISE_SCALES], embeddings.shape[-1])
        return embeddings + values.to(embeddings.dtype)

    return temporary_hooks([model.get_input_embeddings().register_forward_hook(add_noise)])


def check_embedding_noise(model: nn.Module) -> None:
    """Refuse a student whose embeddings get no noise.

    Raises: UnsupportedModel for an encoder-decoder, or a network that computes its own signals.
    """
    if isinstance(model, SignalSource) or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} is no decoder or encoder of one text, whose embeddings could get noise; omit "
            f"--neftune"
        )
