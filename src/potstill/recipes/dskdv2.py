"""DSKDv2: projectors that start from the pseudo-inverse of the heads, and labels from the teacher.

Source: Zhang et al., "A Dual-Space Framework for General Knowledge Distillation" (arXiv:2504.11426).
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@article{zhang2025dual,
  title={A Dual-Space Framework for General Knowledge Distillation of Large Language Models},
  author={Zhang, Xue and Zhang, Songming and Liang, Yunlong and Meng, Fandong and Chen, Yufeng and Xu, Jinan and
    Zhou, Jie},
  journal={arXiv preprint arXiv:2504.11426},
  year={2025}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M distilled to a student of three quarters of its size."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="dskdv2", cross_entropy=0.5, temperature=2.0),
        settings=TrainConfig(tokens=200_000, learning_rate=5e-4),
    )
    return Recipe(
        name="dskdv2",
        summary="dual spaces with projectors that preserve the logits, with half cross-entropy",
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
