"""DistiLLM: a skewed KL divergence; the share of text that the student samples grows when an evaluation is worse.

Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv:2402.03898).
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{ko2024distillm,
  title={DistiLLM: Towards Streamlined Distillation for Large Language Models},
  author={Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young},
  booktitle={ICML},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M and a student of three quarters of it; a buffer replays the completions that it sampled before."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        data=REQUIRED_DATA,
        objective=ObjectiveConfig(name="skew_kl", options={"skew": 0.1}, cross_entropy=0.0),
        rollout="distillm",
        settings=TrainConfig(tokens=200_000, learning_rate=5e-4, eval_every=2),
    )
    return Recipe(
        name="distillm",
        summary="skewed forward KL, adaptive on-policy share with a replay buffer",
        source="arXiv:2402.03898",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "skew": "0.1, distillm/losses.py of the official code",
            "cross_entropy": "0, kd-ratio 1 of the GPT-2 script; this recipe omits its loss on OpenWebText",
            "temperature": "1, the official code has none",
            "rollout, on_policy": "share 0 at the start, plus 0.1 after an evaluation at least 0.1 nats worse than "
            "the previous one; the numbers of the script, whose code compares with the last increase of the share",
            "learning_rate, weight_decay, clip, context": "5e-4, 0.01, 1 and 512, the GPT-2 script",
            "warmup": "ours; the script has none",
            "eval_every": "2, ours; the script evaluates once an epoch",
            "keep, tokens": "ours",
        },
    )
