"""DeltaNet in three of four layers of a trained model: convert, match layer by layer, then distill the whole.

Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv:2406.06484),
section 3.4; its hybrids keep two layers of attention, or put attention of a window into every second layer.
Departs from the paper: it trains from random weights, 1.3B parameters on 100 billion tokens. This starts from a trained
transformer, and matches each new mixer to the attention that it replaces, as MOHAWK does (arXiv:2408.10189). One layer
in four keeps its attention, over the whole context.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER, Stage
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{yang2024parallelizing,
  title={Parallelizing Linear Transformers with the Delta Rule over Sequence Length},
  author={Yang, Songlin and Wang, Bailin and Zhang, Yu and Shen, Yikang and Kim, Yoon},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}"""


ORIGINS = {  # of the numbers that both forms of the delta rule have
    "to": "one layer of attention in four is Qwen3-Next's; one pass of matching is ours",
    "calibration_tokens": "ours: about a hundred steps of matching",
    "cross_entropy": "0, ours: the distribution of the original is the only target",
    "tokens": "ours; the paper trains on 100 billion",
}


def make_stages(*, gated: bool) -> tuple[Stage, ...]:
    """A hybrid with a quarter of the keys and values, healed by the model that it came from."""
    conversion = f"deltanet:gated={str(gated).lower()},attention_every=4,passes=1"
    convert = ConvertConfig(model="smollm2", to=conversion, calibration_tokens=50_000)
    distill = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="forward_kl"),
        settings=TrainConfig(tokens=1_000_000, learning_rate=3e-4),
    )
    return convert, distill


def build_recipe() -> Recipe:
    """The delta rule without a gate."""
    return Recipe(
        name="deltanet",
        summary="three of four layers to DeltaNet, matched layer by layer, then forward KL from the original",
        source="arXiv:2406.06484",
        bibtex=BIBTEX,
        stages=make_stages(gated=False),
        origins={**ORIGINS, "learning_rate": "3e-4, ours; the paper's 1.3B models train from random weights"},
    )
