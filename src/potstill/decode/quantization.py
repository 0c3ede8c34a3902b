"""How far a model with int8 weights is from the same model without."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from potstill.decode.runner import ModelRunner
from potstill.models.eval_mode import eval_mode
from potstill.ops.divergence import forward_kl


def measure_quantization(
    model: PreTrainedModel, ids: Sequence[int], *, vocabulary: int
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
    """(KL of the int8 model from `model` after each token in nats, 1 where both have the same likeliest token).

    Raises: UsageError for a model without code for int8.
    """
    with eval_mode(model):
        logits, int8_logits = (
            runner.compute_logits(runner.prefill(0, ids).features)
            for runner in (ModelRunner(model, vocabulary=vocabulary, quantize=quantize) for quantize in (False, True))
        )
    return forward_kl(logits, int8_logits), (logits.argmax(-1) == int8_logits.argmax(-1)).float()
