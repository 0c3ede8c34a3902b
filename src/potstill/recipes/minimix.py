"""MiniMix: feed-forwards become a pyramid of experts, of which a token computes one; the original model heals them.

Source: MiniMix-2/4x3B, upcycled from MiniMA-2-3B, of arXiv:2311.07052 and the README of its code: two experts in the
bottom quarter of the layers, four above, top-1 gating, a load-balancing loss.
Departs from the original: the active expert has weight 1 and the router a straight-through gradient, where a weight p
would change the function at the start. The code of its training is not published. The loss here is that of MiniMA, half
cross-entropy and half forward KL to the original, with 0.01 of the load of Switch Transformers (arXiv:2101.03961).
Cost and measures: we have run only the tiny form. `docs/architectures.md` has the speed of such layers, and what
20,000 tokens change.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.minima import BIBTEX
from potstill.recipes.registry import Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig


def build_recipe() -> Recipe:
    """SmolLM2-135M with 2.5 times the parameters, and the operations of the original."""
    convert = ConvertConfig(model="smollm2", to="experts:experts=4,top_k=1,pyramid=true")
    distill = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="0.5*cross_entropy+0.5*forward_kl+0.01*balance"),
        settings=TrainConfig(tokens=1_000_000, learning_rate=1e-4, weight_decay=0.1, warmup=0.01),
    )
    return Recipe(
        name="minimix",
        summary="a pyramid of experts that start as copies of the feed-forwards, trained beside the original model",
        source="arXiv:2311.07052",
        bibtex=BIBTEX,
        stages=(convert, distill),
        origins={
            "to": "2 experts in the bottom quarter of the layers, 4 above, 1 active, the README of the official code",
            "calibration_tokens": "ours, and unused: the conversion reads no text",
            "cross_entropy": "half beside half of forward KL, as MiniMA",
            "k": "1, as many experts as a token computes",
            "learning_rate": "1e-4, ours",
            "weight_decay, warmup, clip": "0.1, 1 % and 1, as MiniMA",
            "tokens": "ours",
        },
    )
