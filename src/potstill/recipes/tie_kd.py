"""TIE-KD: a divergence, and the order of the most likely tokens.

Source: Zhang et al., "Towards Understanding and Improving Knowledge Distillation for Neural Machine Translation"
(arXiv:2305.08096). This recipe omits the iterations over predicted prefixes.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{zhang2023towards,
  title={Towards Understanding and Improving Knowledge Distillation for Neural Machine Translation},
  author={Zhang, Songming and Liang, Yunlong and Wang, Shuaibo and Chen, Yufeng and Han, Wenjuan and Liu, Jian and
    Xu, Jinan},
  booktitle={ACL},
  year={2023}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M distilled to a student of three quarters of its size."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="tie_kd", cross_entropy=0.5, options={"k": 5.0}),
        settings=TrainConfig(tokens=200_000),
    )
    return Recipe(
        name="tie-kd",
        summary="forward KL, and the order of the teacher's five most likely tokens",
        source="arXiv:2305.08096",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "k": "5, the official code",
            "cross_entropy": "0.5, the official code",
            "divergence, temperature": "forward KL at 1, the official code",
            "learning_rate, warmup, final_rate, clip": "ours; the code, for translation, has 7e-4, 4,000 steps of "
            "warm-up, an inverse square root, and 5",
            "batch_tokens": "ours; the code takes 32,768",
            "keep, tokens": "ours",
        },
    )
