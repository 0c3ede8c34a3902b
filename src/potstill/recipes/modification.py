"""MoDification: gates by which tokens skip every second layer, closed by a load objective while the model is healed.

Source: Zhang et al., "MoDification: Mixture of Depths Made Easy" (arXiv:2410.14268).
Departs from the paper: the original model is the teacher, where the paper trains by cross-entropy alone. The load has
weight 1 until 26 % of the tokens run through gated layers; the paper's weight is 0.01, for 10 billion tokens. Gates
start fully open (`core.depth.Depth`).
Cost and measures: we have run only the tiny form. `docs/architectures.md` has what 20 steps do: gates stay open, or
close and harm the model.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{zhang2025modification,
  title={{MoDification}: Mixture of Depths Made Easy},
  author={Zhang, Chen and Zhong, Meizhi and Wang, Qimeng and Lu, Xuantao and Ye, Zheyu and Lu, Chengqiang and
    Gao, Yan and Hu, Yao and Chen, Kehai and Zhang, Min and Song, Dawei},
  booktitle={NAACL},
  year={2025}
}"""


def build_recipe() -> Recipe:
    """A student with 70 % of the teacher's operations, in every second layer only for the tokens that need it."""
    convert = ConvertConfig(model="smollm2", to="depths")
    distill = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="0.7*cross_entropy+0.3*forward_kl+1*load:target=0.26"),
        settings=TrainConfig(tokens=1_000_000, learning_rate=1e-4),
    )
    return Recipe(
        name="modification",
        summary="a gate before every second layer, which tokens then skip; healed by the original model",
        source="arXiv:2410.14268",
        bibtex=BIBTEX,
        stages=(convert, distill),
        origins={
            "to": "every second layer and threshold 0.5, the paper; gates that start open, ours",
            "calibration_tokens": "ours, and unused: the conversion reads no text",
            "target": "0.26, ours: 70 % of the operations of SmolLM2-135M",
            "cross_entropy": "0.35, ours: 0.7 beside 0.3 of forward KL and 1 of the load",
            "learning_rate": "1e-4, ours; the paper trains ten thousand times as long at 3e-5",
            "tokens": "ours; the paper trains on about 10 billion",
        },
    )
