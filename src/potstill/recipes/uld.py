"""ULD: compare sorted probabilities, so that vocabularies need not match.

Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs"
(arXiv:2402.12030).
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.dskd import SCRIPTS
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@article{boizard2024towards,
  title={Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs},
  author={Boizard, Nicolas and El Haddad, Kevin and Hudelot, C{\'e}line and Colombo, Pierre},
  journal={arXiv preprint arXiv:2402.12030},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """By default a pruned student with the same tokenizer; with `student`, any teacher works."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="uld", cross_entropy=0.5),
        settings=TrainConfig(tokens=200_000),
    )
    return Recipe(
        name="uld",
        summary="sorted probabilities, and half cross-entropy; --teacher and --student may differ in tokenizer",
        source="arXiv:2402.12030",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "cross_entropy": "0.5, as DSKD (arXiv:2406.17328) runs it; the first code takes 1 and 1.5",
            "temperature": "1: the first code has 1; DSKD's sets 2 and does not use it",
            "learning_rate": "5e-4, the GPT-2 scripts of DSKD",
            **SCRIPTS,
            "keep, tokens": "ours",
        },
    )
