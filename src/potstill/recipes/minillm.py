"""MiniLLM: minimize the reverse KL over whole answers by policy gradient.

Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv:2306.08543).
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{gu2024minillm,
  title={MiniLLM: Knowledge Distillation of Large Language Models},
  author={Gu, Yuxian and Dong, Li and Wei, Furu and Huang, Minlie},
  booktitle={ICLR},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """One step per answer, where the paper takes several; start from a trained student."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        data=REQUIRED_DATA,
        objective=ObjectiveConfig(name="minillm", cross_entropy=0.5),
        on_policy=0.5,
        rollout="minillm",
        settings=TrainConfig(tokens=200_000, learning_rate=5e-6),
    )
    return Recipe(
        name="minillm",
        summary="policy gradient of the reverse KL on answers sampled from a mixture of teacher and student",
        source="arXiv:2306.08543",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "on_policy": "0.5, ours: cross-entropy needs documents that are not sampled",
            "cross_entropy": "0.5, on the data's own answers, where the official code takes a corpus of text",
            "rollout": "samples come from a mixture with 0.2 of the teacher, the paper's section 3.1",
            "mixed, scale, discount, objective.clip": "0.2, 0.5, 0.95 and 0.2, the GPT-2 script and arguments.py",
            "learning_rate, weight_decay, clip, context": "5e-6, 0.01, 1 and 512, the GPT-2 script and arguments.py",
            "warmup, final_rate": "ours; the script has 100 steps of 5,000, then a constant rate",
            "keep, tokens": "ours",
        },
    )
