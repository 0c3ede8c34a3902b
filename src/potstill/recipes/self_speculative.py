"""Self-speculative decoding: the target drafts for itself without some of its layers, which are found on your prompts.

Source: Zhang et al., "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding"
(arXiv:2309.08168), section 3.2.
Departs from the paper: whole layers are skipped, where it skips attention and feed-forward parts on their own. The
search is greedy and scores a set in one pass over the target's own text, where the paper decodes with each set in
Bayesian optimization.
Cost and measures, of `potstill run self-speculative --data prompts.jsonl --out made` on SmolLM2-135M in bfloat16, with
one thread and the first turns of 8 Vicuna questions: 113 sets in 169 seconds. No set pays. The best, `skip:5`, has an
acceptance of 0.84 [0.80, 0.88] and a predicted speed-up of 0.93. We did not decode with it.
"""

from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.skip_layers import SkipLayersConfig

BIBTEX = """@inproceedings{zhang2024draft,
  title={Draft \\& Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding},
  author={Zhang, Jun and Wang, Jue and Li, Huan and Shou, Lidan and Chen, Ke and Chen, Gang and Mehrotra, Sharad},
  booktitle={ACL},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """Nothing is trained; the card has what to give as `--draft`, or that nothing pays."""
    return Recipe(
        name="self-speculative",
        summary="the layers to skip so that a model drafts for itself, found on its own answers to your prompts",
        source="arXiv:2309.08168",
        bibtex=BIBTEX,
        stages=(SkipLayersConfig(model="smollm2", data=REQUIRED_DATA),),
        origins={
            "documents": "8, the prompts of searching.py of the official code",
            "longest": "8, the official code's longest draft",
            "max_tokens": "64, ours; the code takes 32",
            "max_evaluations": "150, ours; the code takes 1,000, each of which decodes",
        },
    )
