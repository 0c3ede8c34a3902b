"""ElasticLM: nested depths in one set of weights, which all learn from the original model in one run.

Source: Zhang et al., "On Elastic Language Models" (arXiv:2311.07204); no code is published.
Departs from the paper: a decoder learns from logits, where the paper aligns relations of hidden states of BERT. Layers
go by measured harm. The sizes of a step follow the sandwich rule (arXiv:1903.05134), since the paper's rule is unknown.
Cost and measures: we have run only the tiny form. `docs/architectures.md` has the same conversion healed with 20,000
tokens: the size of half the parameters falls from 2.307 to 1.742 bits per byte.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@article{zhang2023elastic,
  title={On Elastic Language Models},
  author={Zhang, Chen and Wang, Benyou and Song, Dawei},
  journal={arXiv preprint arXiv:2311.07204},
  year={2023}
}"""


def build_recipe() -> Recipe:
    """Four depths; `potstill serve FOLDER --size auto` is the paper's third part, the schedule."""
    convert = ConvertConfig(model="smollm2", to="elastic:shares=1-0.75-0.5-0.25,dims=depth")
    distill = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="forward_kl", cross_entropy=0.5),
        sizes_per_step=4,
        settings=TrainConfig(tokens=1_000_000, learning_rate=3e-4),
    )
    return Recipe(
        name="elastic",
        summary="four nested depths in one set of weights, trained together from the original's logits",
        source="arXiv:2311.07204",
        bibtex=BIBTEX,
        stages=(convert, distill),
        origins={
            "to": "nested depths at full width, the paper; the four shares are ours",
            "calibration_tokens": "ours",
            "cross_entropy": "0.5, MiniMA of the same authors (arXiv:2311.07052)",
            "sizes_per_step": "4: the largest, the smallest and two random ones, arXiv:1903.05134",
            "learning_rate": "3e-4, MiniMA",
            "tokens": "ours",
        },
    )
