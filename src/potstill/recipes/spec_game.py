"""Spec-game: how large a draft should be and how long its drafts, for one target, on your prompts and your machine.

Source: Liu, Zhang and Song, "How Speculative Can Speculative Decoding Be?" (LREC-COLING 2024), and arXiv:2211.17192,
theorem 3.8, for the formula.
Departs from the paper: by default the drafts are the first layers of the target itself, without training, where the
paper has models of one family. Other drafts are the option `drafts` of `SpecGameConfig`.
Cost and measures, of `potstill run spec-game --data prompts.jsonl --out made` on SmolLM2-135M in bfloat16, with two
threads and 4 first turns of Vicuna and MT-bench: 4 minutes. No draft pays: the best, `exit:3` with one token, decodes
0.76 times as fast as without drafts (theory 0.72). Exits at 3, 8, 15 and 22 of 30 layers keep 1.6, 4.3, 8.5 and 27 % of
their tokens. A token of theirs costs 0.40, 0.62, 0.90 and 1.18 passes of the target.
For Gemma 3 270M a trained draft of two layers with a draft vocabulary of 8,192 tokens pays with one token: 1.16 times
(theory 1.07). Exits with the whole head do not, at 0.61.
"""

from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.spec_game import SpecGameConfig

BIBTEX = """@inproceedings{liu2024speculative,
  title={How Speculative Can Speculative Decoding Be?},
  author={Liu, Zhuorui and Zhang, Chen and Song, Dawei},
  booktitle={LREC-COLING},
  year={2024},
  url={https://aclanthology.org/2024.lrec-main.725}
}"""


def build_recipe() -> Recipe:
    """Nothing is trained; the card and a page have theory and practice of every draft and length."""
    return Recipe(
        name="spec-game",
        summary="draft sizes against draft lengths: acceptance, cost and speed-up of each, and the turning points",
        source="LREC-COLING 2024; the formula is arXiv:2211.17192",
        bibtex=BIBTEX,
        stages=(SpecGameConfig(model="smollm2", data=REQUIRED_DATA),),
        origins={
            "draft_length": "1 to 7, as in the paper",
            "exits": "a tenth to three quarters of the depth, ours; the paper has drafts of several sizes",
            "documents, max_tokens": "4 and 48, ours",
        },
    )
