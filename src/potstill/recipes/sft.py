"""Supervised fine-tuning: cross-entropy on the assistant's tokens, its stop token included.

Source: MiniChat, in arXiv:2311.07052, section 4: loss on assistant tokens only. The baseline for every distilled chat
student. Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.recipes.minima import BIBTEX
from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig


def build_recipe() -> Recipe:
    """SmolLM2-135M fine-tuned on your prompts and responses; the KL to the teacher shows how far it moved."""
    stage = DistillConfig(
        teacher="smollm2",
        student="smollm2",
        data=REQUIRED_DATA,
        objective=ObjectiveConfig(name=CROSS_ENTROPY),
        settings=TrainConfig(tokens=1_000_000, learning_rate=2e-5, weight_decay=0.1, warmup=0.1),
    )
    return Recipe(
        name="sft",
        summary="cross-entropy on the assistant's tokens",
        source="arXiv:2311.07052, section 4",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "learning_rate, weight_decay, warmup, clip": "2e-5, 0.1, 10 % and 1, instruct_minichat.sh",
            "context, batch_tokens": "ours; the script has windows of 4,096, 32 per GPU",
            "patience": "0, ours; the script has 2 epochs",
            "tokens": "ours",
        },
    )
