"""DSKDv2 with exact token alignment: between two tokenizers, at the tokens that are equal in both.

Source: Zhang et al., "A Dual-Space Framework for General Knowledge Distillation" (arXiv:2504.11426).
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.dskdv2 import BIBTEX
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig


def build_recipe() -> Recipe:
    """By default a pruned student with the same tokenizer; with `student`, any teacher works."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="dskdv2_eta", cross_entropy=0.5, temperature=2.0),
        settings=TrainConfig(tokens=200_000, learning_rate=5e-4),
    )
    return Recipe(
        name="dskdv2-eta",
        summary="DSKDv2 at exactly aligned tokens; --teacher and --student may differ in tokenizer",
        source="arXiv:2504.11426",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "temperature": "2.0, the official scripts",
            "cross_entropy": "0.5, kd_rate of the official scripts",
            "divergence": "forward KL, ours: the first version's; the code takes any",
            "learning_rate": "5e-4, the official scripts",
            "batch_tokens": "ours; the scripts take 64 windows a step",
            "on_policy": "0, ours; the code can have the student write, by default half of the text after three epochs",
            "keep, tokens": "ours",
        },
    )
