"""The options of `edit`. Nothing here imports torch."""

from dataclasses import dataclass
from typing import ClassVar

from potstill.core.errors import UsageError
from potstill.core.options import ALLOW_PICKLE, DEVICE, SEED, TRUST_REMOTE_CODE, Option
from potstill.stages.options import TextOptions

SHARED, RANDOM = "shared", "random"


@dataclass(frozen=True, kw_only=True)
class EditOptions(TextOptions):
    """The options of `edit`, without `unused_options` of text: facts are questions of one kind."""

    unused_options: ClassVar[tuple[str, ...]] = ("train_on", "on_bad_row", "mix_exponent")
    model: str
    facts: str | tuple[str, ...]
    languages: str = Option("", "Languages of the facts to edit, such as en,fr,pt; by default all of them.").field()
    limit: int | None = Option[int | None](
        None, "Edit only this many facts, from the first one on; by default all."
    ).field()
    neurons: str = Option(
        SHARED,
        "Which neurons to edit: shared (by all languages), or as many of one language, such as en, or random ones.",
    ).field()
    top: int = Option(200, "Strongest neurons of each layer that count for a language.").field()
    layers: str = Option("", "Layers to edit, counted from 0, such as 8-15,20; by default all.").field()
    paraphrases: int = Option(
        4, "Paraphrases that the model writes of a question that has none; 0: the question alone."
    ).field()
    steps: int = Option(25, "Most steps to learn an edit; it ends where every target is the greedy answer.").field()
    lr: float = Option(0.3, "Learning rate of Adam, relative to the activations.").field()
    clamp: float = Option(1.0, "Largest norm of an edit in a layer, relative to the activations.").field()
    neutral_weight: float = Option(
        0.0625, "Weight of the KL on prompts that hold the subject alone; 0: without them."
    ).field()
    similarity: float = Option(
        0.0,
        "Share of a question's letters, in groups of three, that a prompt must hold beside the subject, 0 to 1; 0 in a "
        "folder of edits: as it is.",
    ).field()
    raw: bool = Option(False, "Ask the questions as they are, without the chat template.").field()
    measure: bool = Option(
        True, "Also measure reliability, generality, locality and portability before and after."
    ).field()
    max_tokens: int = Option(24, "Most tokens of an answer that is measured.").field()
    copy_model: bool = Option(False, "Copy the model into the folder; by default the folder only names it.").field()
    seed: int = SEED.field()
    device: str = DEVICE.field()
    dtype: str = Option("auto", "Data type of the weights: float32, bfloat16, or auto (float32).").field()
    allow_pickle: bool = ALLOW_PICKLE.field()
    trust_remote_code: bool = TRUST_REMOTE_CODE.field()

    def __post_init__(self) -> None:
        """Refuse a number out of its range."""
        super().__post_init__()
        for name, least in (("top", 1), ("paraphrases", 0), ("steps", 1), ("max_tokens", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for name in ("lr", "clamp"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be above 0")
        if not self.neutral_weight >= 0:
            raise UsageError(f"--neutral-weight is {self.neutral_weight}; it must be at least 0")
        if not 0 <= self.similarity <= 1:
            raise UsageError(f"--similarity is {self.similarity}; it is a share, from 0 to 1")
