"""Vanilla knowledge distillation: forward KL at a temperature, with half cross-entropy.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), sections 2 and 3.
Cost and measures: we have run only the tiny form; LOG.md compares temperatures 1 and 2 on a similar student.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.dskd import SCRIPTS
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@article{hinton2015distilling,
  title={Distilling the Knowledge in a Neural Network},
  author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal={arXiv preprint arXiv:1503.02531},
  year={2015}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M distilled to a student of three quarters of its size."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="forward_kl", cross_entropy=0.5, temperature=2.0),
        settings=TrainConfig(tokens=200_000),
    )
    return Recipe(
        name="vanilla-kd",
        summary="half forward KL at temperature 2 and half cross-entropy",
        source="arXiv:1503.02531",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "temperature": "2.0, as every script of DSKD (arXiv:2406.17328) for its vanilla baseline",
            "cross_entropy": "0.5, kd_rate of the same scripts; the paper only asks for 'a considerably lower weight'",
            "learning_rate": "5e-4, the GPT-2 scripts of DSKD",
            **SCRIPTS,
            "keep, tokens": "ours",
        },
    )
