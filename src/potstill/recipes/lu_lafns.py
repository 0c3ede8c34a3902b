"""LU-LAFNs: one change of the neurons that a fact activates in every language edits it in all of them.

Source: Zhang et al., "Multilingual Knowledge Editing with Language-Agnostic Factual Neurons" (arXiv:2406.16416).
No official code exists. The paper has the intersection over languages, one update for all of them, and its cache; the
score of a neuron, the numbers, the clamp, and the rule by which a prompt asks for an edit are our reconstruction.
Departs from the paper: the model itself writes the paraphrases, where the paper has Qwen2-72B-instruct.
Cost and measures: LOG.md has four facts of zsRE in three languages; docs/edit.md has the command for more.
"""

from potstill.recipes.registry import REQUIRED_FACTS, Recipe
from potstill.stages.edit import EditConfig

BIBTEX = """@inproceedings{zhang2025multilingual,
  title={Multilingual Knowledge Editing with Language-Agnostic Factual Neurons},
  author={Zhang, Xue and Liang, Yunlong and Meng, Fandong and Zhang, Songming and Chen, Yufeng and Xu, Jinan and
    Zhou, Jie},
  booktitle={COLING},
  year={2025}
}"""


def build_recipe() -> Recipe:
    """Nothing is trained; the card has reliability, generality, locality and portability by language."""
    return Recipe(
        name="lu-lafns",
        summary="edits of facts through the neurons that all languages share, cached beside the model",
        source="arXiv:2406.16416",
        bibtex=BIBTEX,
        stages=(EditConfig(model="smollm2", facts=REQUIRED_FACTS),),
        origins={
            "top, steps, lr, clamp": "ours; the paper's numbers are not published with code",
            "neutral_weight": "0.0625, the KL factor of ROME's code",
            "paraphrases": "4, ours; the paper's come from another model",
            "similarity": "0, ours: the subject alone decides",
            "max_tokens": "24, ours: what an answer may have",
        },
    )
