"""MiniLM: match the relations between tokens in the last attention layer, for models of any widths.

Source: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation" (arXiv:2012.15828).
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@article{wang2020minilmv2,
  title={MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
  author={Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
  journal={arXiv preprint arXiv:2012.15828},
  year={2020}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M distilled to a student of three quarters of its size."""
    stage = DistillConfig(
        teacher="smollm2",
        keep=0.75,
        objective=ObjectiveConfig(name="relations", cross_entropy=0.5, options={"heads": 32.0}),
        settings=TrainConfig(tokens=200_000),
    )
    return Recipe(
        name="minilm-relations",
        summary="relations of queries, keys and values in the last layer, and cross-entropy"
        "; --teacher and --student may differ in tokenizer",
        source="arXiv:2012.15828",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "heads": "32, the code of MiniMoE (arXiv:2305.12129); the paper takes 48 and 64",
            "cross_entropy": "0.5, ours: the papers distill encoders without labels",
            "temperature": "1, without effect on relations",
            "weight_decay": "0.01, the scripts of MiniMoE",
            "learning_rate, warmup, final_rate, clip": "ours; MiniMoE has 3e-4, 1 % of warm-up, linear decay, and 5",
            "context, batch_tokens": "ours; MiniMoE takes 1,024 windows of 128 a step",
            "keep, tokens": "ours",
        },
    )
