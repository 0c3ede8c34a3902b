"""Phoenix: one model for many languages, fine-tuned on instructions and conversations together.

    potstill run phoenix --data instructions.jsonl --data conversations.jsonl --out both

The data are the mix. Both data sets give Phoenix-inst-chat, the conversations alone Phoenix-chat, and the instructions
alone the third mix that the paper compares. `potstill generate --self-instruct` and `--translate` write instructions in
many languages as Phoenix does. Conversations are what users shared.

Source: Chen et al., "Phoenix: Democratizing ChatGPT across Languages" (arXiv:2304.10453), section 3; the script
`train_phoenix_7b.sh` and `llmzoo/datasets/datasets.py` of its official code. The `<s>` before an answer is trained too.
Departs from the code: a chat that exceeds the context is cut into windows, where Phoenix drops its end.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.recipes.registry import REQUIRED_CHATS, Recipe
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

BIBTEX = """@article{chen2023phoenix,
  title={Phoenix: Democratizing {ChatGPT} across Languages},
  author={Chen, Zhihong and Jiang, Feng and Chen, Junying and Wang, Tiannan and Yu, Fei and Chen, Guiming and
    Zhang, Hongbo and Liang, Juhao and Zhang, Chen and Zhang, Zhiyi and Li, Jianquan and Wan, Xiang and Wang, Benyou and
    Li, Haizhou},
  journal={arXiv preprint arXiv:2304.10453},
  year={2023}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M fine-tuned on your instructions and conversations; the KL shows how far it moved."""
    stage = DistillConfig(
        teacher="smollm2",
        student="smollm2",
        data=REQUIRED_CHATS,
        chat_template="phoenix",
        objective=ObjectiveConfig(name=CROSS_ENTROPY),
        settings=TrainConfig(epochs=3.0, learning_rate=2e-5, warmup=0.03, final_rate=0.0, weight_decay=0.0),
    )
    return Recipe(
        name="phoenix",
        summary="cross-entropy on answers of instructions and conversations in many languages",
        source="arXiv:2304.10453",
        bibtex=BIBTEX,
        stages=(stage,),
        origins={
            "learning_rate, weight_decay, warmup, clip": "2e-5, 0, 3 % and 1, train_phoenix_7b.sh",
            "epochs, final_rate": "3, and a cosine down to 0, train_phoenix_7b.sh",
            "chat_template": "llmzoo/datasets/datasets.py",
            "context, batch_tokens": "ours; the script has windows of 2,048, 256 per step",
        },
    )
