"""MinED: map each token of the teacher to the token of the student with the most similar spelling.

Source: Wan et al., "Knowledge Fusion of Large Language Models" (arXiv:2401.10491), section 3, as a baseline of DSKD.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.dskd import SCRIPTS
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{wan2024knowledge,
  title={Knowledge Fusion of Large Language Models},
  author={Wan, Fanqi and Huang, Xinting and Cai, Deng and Quan, Xiaojun and Bi, Wei and Shi, Shuming},
  booktitle={ICLR},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """By default a pruned student with the same tokenizer; with `student`, any teacher works."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="mined", cross_entropy=0.5, temperature=2.0),
        settings=TrainConfig(tokens=200_000),
    )
    return Recipe(
        name="mined",
        summary="forward KL, mapped by minimum edit distance; --teacher and --student may differ in tokenizer",
        source="arXiv:2401.10491",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "temperature": "2.0, the scripts of DSKD (arXiv:2406.17328)",
            "cross_entropy": "0.5, kd_rate of the same scripts",
            "learning_rate": "5e-4, the GPT-2 scripts of DSKD",
            **SCRIPTS,
            "keep, tokens": "ours",
        },
    )
