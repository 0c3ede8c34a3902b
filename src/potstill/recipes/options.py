"""The options of `run`. Nothing here imports torch."""

from dataclasses import dataclass

from potstill.core.options import DEVICE, DTYPE, SEED, Option
from potstill.stages.options import DRAFT_VOCABULARY


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What replaces a recipe's own models and budget, beside its data."""

    teacher: str | None = Option[str | None](None, "The teacher, instead of the recipe's.").field()
    student: str | None = Option[str | None](None, "A model to train, instead of the recipe's pruned teacher.").field()
    judge: str | None = Option[str | None](
        None, "For m-thinker: http://HOST:PORT/v1#MODEL, a model that compares thinking."
    ).field()
    tokens: int | None = Option[int | None](
        None, "Tokens to train on, such as 2M, instead of the recipe's.", is_count=True
    ).field()
    epochs: float | None = Option[float | None](None, "Passes over the whole text, instead of --tokens.").field()
    draft_vocabulary: int | None = DRAFT_VOCABULARY.field()
    device: str = DEVICE.field()
    dtype: str = DTYPE.field()
    seed: int = SEED.field()
