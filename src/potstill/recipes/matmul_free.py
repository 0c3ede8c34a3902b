"""MatMul-free LM: a recurrence in place of attention, and ternary matrices with a norm inside, healed by the original.

Source: Zhu et al., "Scalable MatMul-free Language Modeling" (arXiv:2406.02528).
Departs from the paper: it trains from scratch. Here embedding, head, feed-forwards, values and output come from a
trained model, which is the teacher. The forget gate of layer l of L keeps at least l / L, where the released code
learns its bounds. The output gate is the paper's; `layers/mixers/mlgru.py` names that of the code.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@article{zhu2024scalable,
  title={Scalable {MatMul}-free Language Modeling},
  author={Zhu, Rui-Jie and Zhang, Yu and Sifferman, Ethan and Sheaves, Tyler and Wang, Yiqiao and Richmond, Dustin and
    Zhou, Peng and Eshraghian, Jason K.},
  journal={arXiv preprint arXiv:2406.02528},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M without products of matrices in its layers, distilled from SmolLM2-135M."""
    recurrent = ConvertConfig(model="smollm2", to="mlgru")
    ternary = ConvertConfig(model=PREVIOUS_FOLDER, to="ternary:norm=true")
    distill = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="forward_kl", cross_entropy=0.5),
        settings=TrainConfig(tokens=2_000_000, learning_rate=2e-3),
    )
    return Recipe(
        name="matmul-free",
        summary="a recurrence in place of attention, and ternary matrices, healed by the original model",
        source="arXiv:2406.02528",
        bibtex=BIBTEX,
        stages=(recurrent, ternary, distill),
        origins={
            "to": "the recurrence, and a norm inside every matrix, the paper; bounds of l / L, the initial ones of its "
            "code",
            "calibration_tokens": "ours; the gains of the norms start from that text",
            "cross_entropy": "0.5, ours: the best of 0, 0.5 and 1 where a ternary character model heals",
            "learning_rate": "2e-3, ours; from scratch the paper takes 4e-3 for 370M parameters and halves it midway",
            "tokens": "ours; the paper trains on 15 to 100 billion",
        },
    )
