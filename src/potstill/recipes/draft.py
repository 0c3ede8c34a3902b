"""A draft for speculative decoding: the target answers the prompts, and a shallow cut of it learns to be accepted.

Source: Zhou et al., "DistillSpec" (arXiv:2310.08461), section 4, with text that the target generates.
Departs from the paper: the draft is cut from its target. Its loss is -log of the acceptance, where the paper compares
total variation with several KLs.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{zhou2024distillspec,
  title={DistillSpec: Improving Speculative Decoding via Knowledge Distillation},
  author={Zhou, Yongchao and Lyu, Kaifeng and Rawat, Ankit Singh and Menon, Aditya Krishna and Rostamizadeh, Afshin and
    Kumar, Sanjiv and Kagy, Jean-Fran{\\c{c}}ois and Agarwal, Rishabh},
  booktitle={ICLR},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """The teacher is the target. Layers alone are dropped, because each of them delays every drafted token."""
    answers = GenerateDatasetConfig(model="smollm2", data=REQUIRED_DATA, max_tokens=256, temperature=1.0)
    distill = DistillConfig(
        teacher="smollm2",
        keep=0.34,
        strategy="depth",
        data=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="acceptance_nll", cross_entropy=0.0),
        settings=TrainConfig(tokens=1_000_000, learning_rate=3e-4),
    )
    return Recipe(
        name="draft",
        summary="a draft for speculative decoding: the target's own answers, then -log of the acceptance",
        source="arXiv:2310.08461",
        bibtex=BIBTEX,
        stages=(answers, distill),
        origins={
            "objective, cross_entropy": "-log of acceptance alone; the paper's total variation has the same minimum",
            "temperature": "1, at which the acceptance is defined",
            "keep, strategy": "ours: the embeddings of a small target are a fifth, and layers are what can go",
            "learning_rate, max_tokens, tokens": "ours",
        },
    )
