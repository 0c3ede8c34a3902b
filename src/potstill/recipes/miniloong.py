"""MiniLoong: raise the rotary base for a context of 32k tokens, then continue on long documents and some short ones.

Source: MiniLoong-3B, MiniMA-2 continued from 4k to 32k tokens, of arXiv:2311.07052 and its code. How was not published:
the base is raised 100 times (arXiv:2309.16039 raises it 50 times), and the mixture is that of arXiv:2410.02660.
The loss is cross-entropy, because the original cannot read the windows; it measures within its own context. Measure the
result with `potstill measure --positions 32768 --needle 32768`.
Cost and measures: we have run only the tiny form. `docs/architectures.md` has the measures of a small model.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.recipes.minima import BIBTEX
from potstill.recipes.registry import REQUIRED_TEXTS, Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

CONTEXT = 32_768


def build_recipe() -> Recipe:
    """SmolLM2-135M, whose context of 8,192 tokens becomes four times as long."""
    convert = ConvertConfig(model="smollm2", to="longer:factor=4,method=base", data=REQUIRED_TEXTS)
    train = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        data=REQUIRED_TEXTS,
        min_document_tokens=8_192,
        short_share=0.4,
        objective=ObjectiveConfig(name=CROSS_ENTROPY),
        settings=TrainConfig(
            tokens=2_000_000,
            context=CONTEXT,
            batch_tokens=CONTEXT,
            micro_tokens=CONTEXT,
            learning_rate=1e-4,
            weight_decay=0.1,
            warmup=0.05,
            checkpoint_activations=True,
        ),
    )
    return Recipe(
        name="miniloong",
        summary="a larger rotary base, then cross-entropy on long documents with short replay",
        source="arXiv:2311.07052",
        bibtex=BIBTEX,
        stages=(convert, train),
        origins={
            "to": "longer: 32k tokens as in MiniLoong; the base as in arXiv:2309.16039, 100 times instead of 50",
            "min_document_tokens": "ours: documents that do not fit into the original context",
            "short_share": "0.4, arXiv:2410.02660",
            "context": "32,768, MiniLoong",
            "weight_decay": "0.1, the adaptation of MiniMA",
            "learning_rate, warmup, clip": "ours",
            "batch_tokens, checkpoint_activations": "ours: one window for each step, in the memory of a laptop",
            "calibration_tokens, tokens": "ours",
        },
    )
