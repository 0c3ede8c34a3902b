"""MiniChat: fine-tuning on the assistant's tokens and their end token under noise on the input embeddings, then DPO.

    potstill run minichat --data chats.jsonl --preferences pairs.jsonl --out chat

Without `--preferences` there is no DPO.

Source: Zhang et al., "Towards the Law of Capacity Gap in Distilling Language Models" (arXiv:2311.07052), section 4; the
scripts `instruct_minichat.sh` and `run_building_data_minichat.py` of its official code. MiniChat-2 adds NEFTune
(arXiv:2310.05914) and DPO (arXiv:2305.18290), whose numbers are not published. The chat template is saved with the
student, whose chats begin with the authors' system sentence unless they have one of their own.
Departs from the code: a chat that exceeds the context is cut into windows, where MiniChat drops tokens of its turns.
The LoRA variant of the code has rank 8, alpha 16 and dropout 0.05: `distill --lora 8` with the options that `potstill
recipes minichat` shows, without dropout.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.recipes.minima import BIBTEX
from potstill.recipes.registry import OPTIONAL_PREFERENCES, REQUIRED_DATA, Recipe
from potstill.stages.align.config import AlignConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig


def build_recipe() -> Recipe:
    """SmolLM2-135M fine-tuned on your prompts and responses; the KL to the teacher shows how far it moved."""
    stage = DistillConfig(
        teacher="smollm2",
        student="smollm2",
        data=REQUIRED_DATA,
        chat_template="minichat",
        objective=ObjectiveConfig(name=CROSS_ENTROPY),
        settings=TrainConfig(
            epochs=3.0,
            learning_rate=2e-5,
            warmup=0.1,
            final_rate=0.0,
            weight_decay=0.1,
            neftune=5.0,
            eval_every=100,
            patience=2,
        ),
    )
    alignment = AlignConfig(model=PREVIOUS_FOLDER, data=OPTIONAL_PREFERENCES, objective="dpo:beta=0.1")
    return Recipe(
        name="minichat",
        summary="cross-entropy on the assistant's tokens, with noise on the embeddings; then DPO on --preferences",
        source="arXiv:2311.07052, section 4",
        bibtex=BIBTEX,
        stages=(stage, alignment),
        origins={
            "learning_rate, weight_decay, warmup, clip": "2e-5, 0.1, 10 % and 1, instruct_minichat.sh; DPO has 1e-6, "
            "arXiv:2305.18290, and no decay, ours",
            "epochs, final_rate": "3, and a cosine down to 0, instruct_minichat.sh; DPO has 1 and 10 %, ours",
            "objective": "DPO with beta 0.1, arXiv:2305.18290",
            "patience": "2 evaluations; instruct_minichat.sh waits for 2 epochs",
            "eval_every": "100 steps, ours",
            "chat_template": "run_building_data_minichat.py and conversation.py",
            "neftune": "5: MiniChat-2 uses NEFTune, and arXiv:2310.05914 recommends 5, 10 or 15",
            "context, batch_tokens": "ours; the script has windows of 4,096, 32 per GPU",
        },
    )
