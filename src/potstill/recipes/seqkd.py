"""SeqKD: the teacher answers the prompts once, and the student trains on its answers.

Source: Kim and Rush, "Sequence-Level Knowledge Distillation" (arXiv:1606.07947), section 3.2.
Departs from the paper: answers are sampled, where it takes the best of a beam; unfinished answers are omitted.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{kim2016sequence,
  title={Sequence-Level Knowledge Distillation},
  author={Kim, Yoon and Rush, Alexander M.},
  booktitle={EMNLP},
  year={2016}
}"""


def build_recipe() -> Recipe:
    """The validation split keeps the answers of the data, so that students are measured on the same text."""
    answers = GenerateDatasetConfig(model="smollm2", data=REQUIRED_DATA, max_tokens=256, temperature=1.0)
    distill = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        data=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name=CROSS_ENTROPY),
        settings=TrainConfig(tokens=200_000),
    )
    return Recipe(
        name="seqkd",
        summary="the teacher's answers as a data set, then cross-entropy",
        source="arXiv:1606.07947",
        bibtex=BIBTEX,
        stages=(answers, distill),
        origins={
            "objective": "cross-entropy on the teacher's output, equation 5",
            "temperature": "1, the model as it is; the paper takes the best of a beam of 5",
            "max_tokens, keep, tokens": "ours",
        },
    )
