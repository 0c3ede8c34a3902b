"""Medusa: heads that draft the next tokens from the target's last hidden state, trained on the target's own answers.

Source: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads"
(arXiv:2401.10774), Medusa-1 (section 2.2.1) with self-distillation (section 2.3.2).
Departs from the paper: the heads share the target's output layer, where each head of the paper trains a copy of it.
Cost and measures, of `potstill run medusa --data prompts.jsonl --out made --epochs 4` on SmolLM2-135M with one thread
and the first turns of 50 Vicuna questions: 15 answers end within 256 tokens, which gives 8 steps in 140 seconds in all.
On 20 MT-bench questions the acceptance of the first draft token rises from 0.012 to 0.028, and the tokens per pass from
1.01 to 1.03. So little training does not pay; we have made no longer run.
"""

from potstill.recipes.registry import REQUIRED_DATA, Recipe
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.medusa.config import MedusaConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@article{cai2024medusa,
  title={Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads},
  author={Cai, Tianle and Li, Yuhong and Geng, Zhengyang and Peng, Hongwu and Lee, Jason D. and Chen, Deming and
    Dao, Tri},
  journal={arXiv preprint arXiv:2401.10774},
  year={2024}
}"""


def build_recipe() -> Recipe:
    """The teacher is the target. Held-out prompts are those of your data, and the target answers them itself."""
    answers = GenerateDatasetConfig(model="smollm2", data=REQUIRED_DATA, max_tokens=256, temperature=1.0)
    heads = MedusaConfig(
        model="smollm2",
        data=PREVIOUS_FOLDER,
        settings=TrainConfig(tokens=1_000_000, learning_rate=1e-3, warmup=0.1, final_rate=0.0, weight_decay=0.0),
    )
    return Recipe(
        name="medusa",
        summary="heads on a frozen target that draft its next tokens, from the target's own answers",
        source="arXiv:2401.10774",
        bibtex=BIBTEX,
        stages=(answers, heads),
        origins={
            "decay": "0.8, lambda of equation 1",
            "num_heads, learning_rate, warmup, final_rate, weight_decay": "3, 1e-3, 10 %, 0 and 0, the command in "
            "README.md of the official code; the paper has five heads and 2e-3",
            "temperature": "1, the model as it is",
            "batch_tokens": "ours; the command takes 128 texts of at most 2,048 tokens",
            "max_tokens, tokens": "ours",
        },
    )
