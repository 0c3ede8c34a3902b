"""LayerMoE: experts for new languages, more in layers where languages are less alike, in two stages of training.

Source: Zhang et al., "Less, but Better: Efficient Multilingual Expansion for LLMs via Layer-wise Mixture-of-Experts"
(arXiv:2505.22582), in the variant `no_cls` of its code, without the classifier of whole texts. First the routers and
the new experts learn, and the original feed-forwards rest. Then only the routers learn, and send old languages to them.
Departs from the paper: both stages read the same text, new languages with some of the old ones, where the paper's first
stage reads the new languages alone. See `transforms/convert/to_layermoe.py` for the router.
Give text whose rows have `text` and `language`. The recipe takes English (`en`) for the language that the model knows.
Cost and measures: we have run only the tiny form.
"""

from potstill.objectives.config import ObjectiveConfig
from potstill.recipes.registry import REQUIRED_LANGUAGES, Recipe
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import PREVIOUS_FOLDER
from potstill.train.config import TrainConfig

BIBTEX = """@inproceedings{zhang2025less,
  title={Less, but Better: Efficient Multilingual Expansion for {LLMs} via Layer-wise Mixture-of-Experts},
  author={Zhang, Xue and Liang, Yunlong and Meng, Fandong and Zhang, Songming and Chen, Yufeng and Xu, Jinan and
    Zhou, Jie},
  booktitle={ACL},
  year={2025}
}"""


def build_recipe() -> Recipe:
    """SmolLM2-135M with new languages; the KL to the teacher shows how far it moved."""
    convert = ConvertConfig(model="smollm2", to="layermoe:old=en", data=REQUIRED_LANGUAGES, calibration_tokens=200_000)
    learn = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        data=REQUIRED_LANGUAGES,
        objective=ObjectiveConfig(name="1*cross_entropy+0.01*balance:k=2"),
        train=r"router|experts\.[1-9]",
        settings=TrainConfig(tokens=1_000_000, context=1024, batch_tokens=2048, learning_rate=5e-5),
    )
    route = DistillConfig(
        teacher="smollm2",
        student=PREVIOUS_FOLDER,
        data=REQUIRED_LANGUAGES,
        objective=ObjectiveConfig(name="1*cross_entropy+0.1*language_routing:old=en"),
        train="router",
        settings=TrainConfig(tokens=200_000, learning_rate=5e-5),
    )
    return Recipe(
        name="layermoe",
        summary="experts for new languages, more where languages are less alike; then routers that keep the old ones",
        source="arXiv:2505.22582",
        bibtex=BIBTEX,
        stages=(convert, learn, route),
        origins={
            "to": "2.5 experts for each layer, 2 active, as Llama-3.2-3B in the paper",
            "calibration_tokens": "ours; the paper reads 100,000 of each language",
            "train": "the routers and all experts but the first, then the routers, the official code",
            "learning_rate": "5e-5, both scripts",
            "context": "1,024 and 512, the scripts",
            "batch_tokens, warmup, weight_decay": "ours",
            "tokens": "ours; the paper trains on 2 billion of each new language, then on 50,000 texts of each",
        },
    )
