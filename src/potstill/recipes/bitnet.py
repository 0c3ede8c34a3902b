"""BitNet b1.58: weights in {-1, 0, 1} and activations of 8 bits, healed by the model that they come from.

Source: Ma et al., "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (arXiv:2402.17764).
Departs from the paper: it trains from scratch. Here the latent weights are those of a trained model, and the same model
before rounding is the teacher. `potstill convert FOLDER --to packed_ternary` stores the result in 2 bits a weight.
Cost and measures: we have run only the tiny form. `docs/architectures.md` has the same conversion healed with 20,000
tokens: 6.72 bits per byte fall to 3.05, where the original has 1.13.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@article{ma2024era,
  title={The Era of 1-bit {LLM}s: All Large Language Models are in 1.58 Bits},
  author={Ma, Shuming and Wang, Hongyu and Ma, Lingxiao and Wang, Lei and Wang, Wenhui and Huang, Shaohan and
    Dong, Li and Wang, Ruiping and Xue, Jilong and Wei, Furu},
  journal={arXiv preprint arXiv:2402.17764},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M with ternary matrices, distilled from SmolLM2-135M."""
    convert = ConvertConfig(model="smollm2", to="ternary")
    distill = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        objective=ObjectiveConfig(name="forward_kl", cross_entropy=0.5),
        settings=TrainConfig(tokens=1_000_000, learning_rate=1e-3),
    )
    return Recipe(
        name="bitnet",
        summary="weights in {-1, 0, 1} and activations of 8 bits, healed by the original model",
        source="arXiv:2402.17764",
        bibtex=BIBTEX,
        stages=(convert, distill),
        origins={
            "to": "absmean weights, absmax activations for each token, the paper",
            "calibration_tokens": "ours, and unused: the conversion reads no text",
            "cross_entropy": "0.5, ours: the best of 0, 0.5 and 1 on a character model",
            "learning_rate": "1e-3, ours: from 1e-3 to 3e-3 a character model heals alike; the paper trains from "
            "scratch at 1.5e-3 and above",
            "tokens": "ours; the paper trains on 100 billion",
        },
    )
