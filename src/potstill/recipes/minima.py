"""MiniMA: prune for initialization (width, then depth), then distill logits with half cross-entropy.

Source: Zhang et al., "Towards the Law of Capacity Gap in Distilling Language Models" (arXiv:2311.07052), section 3.
Departs from the paper: layers are dropped by measured harm, where MiniMA drops the first and the last four. Losses are
averaged over trained positions only, where its code includes padding.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.stages.prune import PruneConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@article{zhang2023law,
  title={Towards the Law of Capacity Gap in Distilling Language Models},
  author={Zhang, Chen and Song, Dawei and Ye, Zheyu and Gao, Yan},
  journal={arXiv preprint arXiv:2311.07052},
  year={2023}
}"""


def build_recipe() -> Recipe:
    """A student of two fifths of the teacher, as the law of the capacity gap suggests."""
    prune = PruneConfig(model="smollm2", keep=0.4, strategy="both")
    distill = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="forward_kl", cross_entropy=0.5, temperature=1.0),
        settings=TrainConfig(tokens=1_000_000, learning_rate=3e-4, weight_decay=0.1, warmup=0.01),
    )
    return Recipe(
        name="minima",
        summary="prune all dimensions alike, then half forward KL and half cross-entropy",
        source="arXiv:2311.07052",
        bibtex=BIBTEX,
        stages=(prune, distill),
        origins={
            "keep": "0.4: the best teacher is about 2.5 times its student",
            "strategy": "width, then depth, run_converting_llama.py of the official code",
            "calibration_tokens": "ours",
            "cross_entropy, temperature": "0.5 and 1, run_distillation_llama_ds.py of the official code",
            "learning_rate, weight_decay, warmup, clip": "3e-4, 0.1, 1 % and 1, distil_minima.sh",
            "context, batch_tokens": "ours; the script has windows of 4,096, 64 per GPU",
            "tokens": "ours; the paper distills on 126 billion",
        },
    )
