"""Gated DeltaNet in three of four layers of a trained model: convert, match layer by layer, then distill the whole.

Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv:2412.06464), section 3; one layer
of attention in four as in Qwen3-Next.
Departs from the paper: it trains from random weights, 1.3B parameters on 100 billion tokens. This starts from a trained
transformer, and matches each new mixer to the attention that it replaces, as MOHAWK does (arXiv:2408.10189). Its
hybrids mix with attention of a window; here it sees the whole context, and keeps its rotary positions.
Cost and measures: we have run only the tiny form. `docs/architectures.md` has a like conversion healed with 40,000
tokens: 1.775 bits per byte fall to 1.272, where the original has 1.131.
"""

from potstill.recipes.deltanet import ORIGINS, make_stages
from potstill.recipes.registry import Recipe

BIBTEX = """@inproceedings{yang2025gated,
  title={Gated Delta Networks: Improving Mamba2 with Delta Rule},
  author={Yang, Songlin and Kautz, Jan and Hatamizadeh, Ali},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""


def build_recipe() -> Recipe:
    """The delta rule with a gate."""
    return Recipe(
        name="gated-deltanet",
        summary="three of four layers to Gated DeltaNet, matched layer by layer, then forward KL from the original",
        source="arXiv:2412.06464",
        bibtex=BIBTEX,
        stages=make_stages(gated=True),
        origins={**ORIGINS, "learning_rate": "3e-4, ours; the paper trains from random weights with 4e-4"},
    )
