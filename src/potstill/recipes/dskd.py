"""DSKD: compare student and teacher through one head, in the hidden space of each.

Source: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models" (arXiv:2406.17328), section 3.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{zhang2024dual,
  title={Dual-Space Knowledge Distillation for Large Language Models},
  author={Zhang, Songming and Zhang, Xue and Sun, Zengkui and Chen, Yufeng and Xu, Jinan},
  booktitle={EMNLP},
  year={2024}
}"""


SCRIPTS = {
    "weight_decay, clip, context": "0.01, 1 and 512, the GPT-2 scripts of DSKD",
    "warmup, final_rate": "ours; the scripts have no warm-up, and a cosine down to 1e-7",
    "batch_tokens": "ours; the scripts take 32 windows a step",
}


def build_recipe() -> Recipe:
    """SmolLM2-135M distilled to a student of three quarters of its size."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="dskd", cross_entropy=0.5, temperature=2.0),
        settings=TrainConfig(tokens=200_000, learning_rate=5e-4),
    )
    return Recipe(
        name="dskd",
        summary="both distributions from one head, in both hidden spaces, with half cross-entropy",
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
