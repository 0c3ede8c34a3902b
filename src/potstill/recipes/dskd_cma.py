"""DSKD with cross-model attention: dual-space distillation between two tokenizers.

Source: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models" (arXiv:2406.17328), section 3.2.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.dskd import BIBTEX, SCRIPTS
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig


def build_recipe() -> Recipe:
    """By default a pruned student with the same tokenizer; with `student`, any teacher works."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="dskd_cma", cross_entropy=0.5, temperature=2.0),
        settings=TrainConfig(tokens=200_000, learning_rate=5e-4),
    )
    return Recipe(
        name="dskd-cma",
        summary="dual-space distillation by cross-model attention; --teacher and --student may differ in tokenizer",
        source="arXiv:2406.17328",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "temperature": "2.0, every script of the official code",
            "cross_entropy": "0.5, kd_rate of the official scripts",
            "divergence": "forward KL, kd-objective of the GPT-2 script",
            "learning_rate": "5e-4, and 1e-3 for projectors, the GPT-2 scripts",
            **SCRIPTS,
            "keep, tokens": "ours",
        },
    )
