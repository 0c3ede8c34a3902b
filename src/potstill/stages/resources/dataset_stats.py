"""Statistics of packs that affect costs, and of the tokenization of a teacher with another tokenizer."""

from typing import Any, NamedTuple

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import ALIGNED_PAIRS, get_view, supervised_positions
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, inspect_tokenizers
from potstill.data.packing import Packs, collate
from potstill.models.spec import ModelSpec
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_token_ids
from potstill.objectives.config import ObjectiveConfig

SAMPLE_PACKS = 16  # packs whose teacher tokens are counted


class PackingStats(NamedTuple):
    """Statistics of packs: the filled share, the trained share, and how many tokens a token attends to on average."""

    fill: float
    trained: float
    seen: float


def compute_packing_stats(packs: Packs) -> PackingStats:
    """The statistics of `packs`. The n-th token of a document attends to n tokens."""
    lengths = packs.lengths.astype("float64")
    return PackingStats(
        packs.fill, packs.num_trained / packs.num_tokens, float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    )


class TeacherTokenization(NamedTuple):
    """How a teacher with another tokenizer tokenizes the text.

    `vocabulary` is its number of token ids. `token_ratio` and `row_ratio` are its tokens and its trained positions for
    each of the student's. `aligned_share` is the share of the student's trained positions that are aligned. `seen` is
    the mean number of tokens that one of its tokens attends to.
    """

    vocabulary: int
    token_ratio: float
    row_ratio: float
    aligned_share: float
    seen: float

    def to_dict(self) -> dict[str, float]:
        """A plain dictionary, for JSON."""
        return {
            "aligned_share": self.aligned_share,
            "teacher_tokens": self.token_ratio,
            "teacher_rows": self.row_ratio,
            "teacher_vocabulary": self.vocabulary,
        }


def measure_teacher_tokenization(packs: Any, *, vocabulary: int) -> TeacherTokenization:
    """The statistics of the first 16 of `CrossTokenizerPacks`."""
    batch = collate([packs[i] for i in range(min(SAMPLE_PACKS, len(packs)))])
    teacher_batch, num_student_rows = get_view(batch, "teacher"), len(supervised_positions(batch)[1])
    return TeacherTokenization(
        vocabulary=vocabulary,
        token_ratio=teacher_batch["input_ids"].numel() / batch["input_ids"].numel(),
        row_ratio=len(supervised_positions(teacher_batch)[1]) / max(1, num_student_rows),
        aligned_share=batch[ALIGNED_PAIRS].shape[1] / max(1, num_student_rows),
        seen=float((teacher_batch["position_ids"] + 1).double().mean()),
    )


def match_vocabularies(
    teacher: ModelSpec, student: ModelSpec, packs: Packs, objective: ObjectiveConfig, *, chats: bool = False
) -> tuple[int, TeacherTokenization | None]:
    """The number of ids that both share; or of the student's ids, with the teacher's tokenization if it is used.

    Raises: VocabularyMismatch if the tokenizers differ, and the objective compares token by token.
    """
    try:
        return count_shared_ids(teacher.tokenizer, student.tokenizer), None
    except VocabularyMismatch:
        if not objective.supports_cross_tokenizer:
            raise
    student_vocabulary = count_token_ids(student.tokenizer)
    if not objective.uses_teacher:
        return student_vocabulary, None
    reader_pair = inspect_tokenizers(student.tokenizer, teacher.tokenizer, chats=chats)
    paired_packs = CrossTokenizerPacks(packs, *reader_pair, max_length=teacher.blueprint.context)
    return student_vocabulary, measure_teacher_tokenization(paired_packs, vocabulary=count_token_ids(teacher.tokenizer))
