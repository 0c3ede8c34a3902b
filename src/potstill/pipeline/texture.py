"""What the packs of a text are like: how full, how much of it is trained, how a teacher reads it otherwise."""

from typing import Any, NamedTuple

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import PAIRS, supervised, view
from potstill.data.pack import Packs, collate
from potstill.data.pairs import Paired, readers
from potstill.models.outline import Outline
from potstill.models.vocabulary import real_ids, shared_ids
from potstill.objectives.named import Mixture

SAMPLED = 16  # packs that tell how a teacher with another tokenizer reads the text


class Texture(NamedTuple):
    """What the packs of a text are like: how full, how much of it is trained, how many tokens a token sees."""

    fill: float
    trained: float
    seen: float


def texture(packs: Packs) -> Texture:
    """The texture of packs; a token at place n of its document sees n tokens."""
    lengths = packs.lengths.astype("float64")
    return Texture(packs.fill, packs.trained / packs.tokens, float((lengths * (lengths + 1) / 2).sum() / lengths.sum()))


class Otherwise(NamedTuple):
    """How a teacher with another tokenizer reads a text: its real ids, its tokens for each of the student's.

    `rows` are its trained positions for each of the student's, `aligned` the share of the student's that are aligned,
    `seen` the tokens that one of its tokens sees.
    """

    vocabulary: int
    tokens: float
    rows: float
    aligned: float
    seen: float

    def to_dict(self) -> dict[str, float]:
        """Plain data, for JSON."""
        return {
            "aligned_share": self.aligned,
            "teacher_tokens": self.tokens,
            "teacher_rows": self.rows,
            "teacher_vocabulary": self.vocabulary,
        }


def otherwise(packs: Any, *, vocabulary: int) -> Otherwise:
    """What the first of `data.pairs.Paired` packs say."""
    batch = collate([packs[i] for i in range(min(SAMPLED, len(packs)))])
    theirs, ours = view(batch, "teacher"), len(supervised(batch)[1])
    return Otherwise(
        vocabulary=vocabulary,
        tokens=theirs["input_ids"].numel() / batch["input_ids"].numel(),
        rows=len(supervised(theirs)[1]) / max(1, ours),
        aligned=batch[PAIRS].shape[1] / max(1, ours),
        seen=float((theirs["position_ids"] + 1).double().mean()),
    )


def ids_of(
    teacher: Outline, student: Outline, packs: Packs, objective: Mixture, *, chats: bool = False
) -> tuple[int, Otherwise | None]:
    """The ids that both share; or the student's own, and how a teacher that is asked reads its text otherwise.

    Raises: VocabularyMismatch for an objective that compares token by token; UsageError for a text too long.
    """
    try:
        return shared_ids(teacher.tokenizer, student.tokenizer), None
    except VocabularyMismatch:
        if not objective.across:
            raise
    own = real_ids(student.tokenizer)
    if not objective.teaches:
        return own, None
    both = readers(student.tokenizer, teacher.tokenizer, chats=chats)
    paired = Paired(packs, *both, longest=teacher.blueprint.context)
    return own, otherwise(paired, vocabulary=real_ids(teacher.tokenizer))
