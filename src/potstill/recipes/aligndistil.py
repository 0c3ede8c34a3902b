"""AlignDistil: DPO, DPO with the sides exchanged, and a policy that learns the extrapolation of both, token by token.

Source: Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation"
(arXiv:2503.02832), off-policy: on the chosen answers. `align --on-policy 1` with the options of the last stage is the
on-policy form.
Departs from the authors' code: the total variation has its factor 1/2, so that `ratio` is the paper's r, and the first
token of an answer is trained (`aligndistil:compat=official` does as the code).
Cost and measures: we have run only the tiny form.
"""

from dataclasses import replace

from potstill.recipes.registry import REQUIRED_PREFERENCES, Recipe
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.options import AlignTrainConfig
from potstill.stages.sequence import name_stage_folder

BIBTEX = """@inproceedings{zhang2025aligndistil,
  title={{AlignDistil}: Token-Level Language Model Alignment as Adaptive Policy Distillation},
  author={Zhang, Songming and Zhang, Xue and Zhang, Tong and Hu, Bojie and Chen, Yufeng and Xu, Jinan},
  booktitle={ACL},
  year={2025}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M aligned with your preferences; all three stages begin at the same model."""
    settings = AlignTrainConfig(epochs=1.0, learning_rate=1e-6, warmup=0.1, weight_decay=0.0)
    dpo = AlignConfig(model="smollm2", data=REQUIRED_PREFERENCES, objective="dpo:beta=0.1", settings=settings)
    reverse_dpo = replace(dpo, objective="dpo:beta=0.1,swap=1")
    distillation = replace(
        dpo,
        objective="aligndistil:beta=0.1,ratio=20,epsilon=0.001",
        plus=name_stage_folder(1),
        minus=name_stage_folder(2),
    )
    return Recipe(
        name="aligndistil",
        summary="DPO and reverse DPO, then a policy distilled from their extrapolation, adaptively for each token",
        source="arXiv:2503.02832",
        bibtex=BIBTEX,
        stages=(dpo, reverse_dpo, distillation),
        origins={
            "objective": "DPO, DPO of exchanged sides, AlignDistil off-policy; beta 0.1, r 20 and epsilon 0.001, the "
            "paper; its code has 10 for r, without the 1/2 of the total variation",
            "plus, minus": "the models of stages 1 and 2, the paper",
            "epochs, learning_rate, warmup, clip": "1, 1e-6, 10 % and 1, the scripts of the official code",
            "weight_decay": "0, ours",
            "final_rate": "10 %, ours; the scripts have a cosine down to a least rate",
            "context, batch_tokens": "ours; the scripts have 128 pairs a step, and up to 2,048 tokens for each side",
        },
    )
