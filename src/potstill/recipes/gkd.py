"""GKD: the student samples completions for half of the documents, and learns from the teacher on all of them.

Source: Agarwal et al., "On-Policy Distillation of Language Models" (arXiv:2306.13649).
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{agarwal2024onpolicy,
  title={On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes},
  author={Agarwal, Rishabh and Vieillard, Nino and Zhou, Yongchao and Stanczyk, Piotr and Ramos, Sabela and
    Geist, Matthieu and Bachem, Olivier},
  booktitle={ICLR},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """Train a pruned student before: one that stops at once learns nothing from its samples (docs/rollouts.md)."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        data=REQUIRED_DATA,
        objective=ObjectiveConfig(name="jsd", options={"beta": 0.5}, cross_entropy=0.0),
        on_policy=0.5,
        settings=TrainConfig(tokens=200_000),
    )
    return Recipe(
        name="gkd",
        summary="on-policy at a share of 0.5, generalized Jensen-Shannon divergence",
        source="arXiv:2306.13649",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "on_policy": "0.5, lambda of the paper's mixed setting",
            "objective, beta, cross_entropy": "JSD with beta 0.5, one of the paper's; no cross-entropy",
            "keep, tokens": "ours",
        },
    )
