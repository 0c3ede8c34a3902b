"""CM-Align: preferences from the model's own answers, by agreement with its most consistent English answer, then DPO.

    potstill run cm-align --data parallel.jsonl --out aligned

The data ask each question in several languages: rows with `id`, `language` and `prompt`. In each language but English,
the answer that agrees most with the English one is preferred to the one that agrees least, by their final numbers. For
code or free text, run the two commands of docs/rewards.md with another `--consistency`.

Source: Zhang et al., "CM-Align: Consistency-based Multilingual Alignment for Large Language Models" (arXiv:2509.08541).
Its code was not available: beta and the measures of consistency are the paper's; the numbers of samples, their
temperature and the weight of the likelihood are ours. For free text the paper has no likelihood term.
Cost and measures: we have run only the tiny form.
"""

from potstill.recipes.registry import REQUIRED_PARALLEL, Recipe
from potstill.stages.align.config import AlignConfig
from potstill.stages.candidates.config import CandidatesConfig
from potstill.stages.candidates.options import PREFER
from potstill.stages.sequence import PREVIOUS_FOLDER

BIBTEX = """@inproceedings{zhang2025cmalign,
  title={{CM-Align}: Consistency-based Multilingual Alignment for Large Language Models},
  author={Zhang, Xue and Liang, Yunlong and Meng, Fandong and Zhang, Songming and Chen, Yufeng and Xu, Jinan and
    Zhou, Jie},
  booktitle={Findings of EMNLP},
  year={2025}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M aligned across the languages of your prompts."""
    pairs = CandidatesConfig(
        model="smollm2", data=REQUIRED_PARALLEL, select=PREFER, samples=8, temperature=0.9, max_tokens=384
    )
    alignment = AlignConfig(model="smollm2", data=PREVIOUS_FOLDER, objective="dpo:beta=0.1,nll=0.2")
    return Recipe(
        name="cm-align",
        summary="DPO in many languages on the model's own answers, ranked by agreement with its English answer",
        source="arXiv:2509.08541",
        bibtex=BIBTEX,
        stages=(pairs, alignment),
        origins={
            "select": "the answers that agree most and least with the consistent English one, the paper",
            "objective": "DPO with beta 0.1, the paper, and 0.2 of the chosen answer's likelihood, ours",
            "samples, temperature": "8 at 0.9, ours; those of the paper are not known",
            "max_tokens": "384, ours: two answers and a prompt fit into the context of 1,024",
            "epochs, learning_rate, warmup, weight_decay": "1, 1e-6, 10 % and 0, ours, the defaults of align",
            "context, batch_tokens": "1,024 and 4,096, ours, the defaults of align",
        },
    )
