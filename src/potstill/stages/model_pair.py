"""A student and its teacher in memory, and how both read one text."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from potstill.core.errors import VocabularyMismatch
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo, inspect_tokenizers
from potstill.data.packing import Packs
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel
from potstill.models.signals import probe_model
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.stages.dataset import PreparedDataset
from potstill.teachers.external import ExternalTeacher


class ModelPair(NamedTuple):
    """The student to be trained with its tokenizer and origin, the teacher or what stands for it, and shared ids.

    `across` tokenizers no id is shared, and `vocabulary` is the student's own. Of `several` teachers `teacher` is the
    first.
    """

    student: PreTrainedModel
    origin: LoadedModel
    teacher: LoadedModel | ExternalTeacher
    vocabulary: int
    parents: list[Any]
    details: dict[str, Any]
    is_cross_tokenizer: bool = False
    needs_teacher_tokens: bool = True  # whether a teacher of another tokenizer has to read along
    needs_edit_alignment: bool = False
    is_chat: bool = False  # whether the text that is read is of turns, which each template writes in its own way
    ensemble_teachers: Mapping[str, LoadedModel | ExternalTeacher] = MappingProxyType({})

    @property
    def teachers(self) -> Mapping[str, LoadedModel | ExternalTeacher]:
        """Every teacher, by its name among the networks of a study."""
        return self.ensemble_teachers or {"teacher": self.teacher}

    @property
    def pair_info(self) -> PairInfo:
        """Both networks, for an objective that has to know them."""
        assert isinstance(self.teacher, LoadedModel)
        student_tokenizer, teacher_tokenizer = self.origin.tokenizer, self.teacher.tokenizer
        return PairInfo(
            ModelInfo(self.student, student_tokenizer),
            ModelInfo(self.teacher.model, teacher_tokenizer),
            self.end_token_ids,
        )

    @property
    def end_token_ids(self) -> tuple[int, int] | None:
        """The ids by which student and teacher end an answer in a chat; None where that is no one token of each."""
        if not (self.is_cross_tokenizer and self.is_chat):
            return None
        student_end, teacher_end = (
            None if reader.chat_markers is None else reader.tokenizer.get_vocab().get(reader.chat_markers.ending)
            for reader in self.readers
        )
        return None if student_end is None or teacher_end is None else (student_end, teacher_end)

    @property
    def vocabulary_sizes(self) -> int | dict[str, int]:
        """The real ids that are shared, or of each network by its name."""
        if not self.is_cross_tokenizer:
            return self.vocabulary
        info = self.pair_info
        return {"student": info.student.vocab_size, "teacher": info.teacher.vocab_size}

    def prepare_packs(self, packs: Packs, *, prefetch: bool = False) -> Any:
        """`packs` as both read them; a teacher that is not here is asked about them `ahead` of time."""
        if not (self.is_cross_tokenizer and self.needs_teacher_tokens):
            return self._prefetch(packs) if prefetch else packs
        assert isinstance(self.teacher, LoadedModel)
        return CrossTokenizerPacks(
            packs,
            *self.readers,
            needs_edit_alignment=self.needs_edit_alignment,
            max_length=get_max_context(self.teacher.model),
        )

    @property
    def readers(self) -> tuple[TokenizerInfo, TokenizerInfo]:
        """Student and teacher, as they read the text."""
        assert isinstance(self.teacher, LoadedModel)
        return inspect_tokenizers(self.origin.tokenizer, self.teacher.tokenizer, chats=self.is_chat)

    def _prefetch(self, packs: Packs) -> Any:
        prefetched_packs: object = packs
        has_routes = "routes" in packs.fields
        for number, teacher in enumerate(self.teachers.values()):
            if isinstance(teacher, ExternalTeacher):
                prefetched_packs = teacher.prefetch(prefetched_packs, route=number if has_routes else None)
        return prefetched_packs


def check_token_ids(dataset: PreparedDataset, pair: ModelPair) -> None:
    """Refuse text that the student's tokenizer reads with tokens that the teacher's does not have.

    Raises: VocabularyMismatch.
    """
    largest_ids = [int(packs.input_ids.max(initial=0)) for packs in (dataset.packs, dataset.validation_packs)]
    largest = max(*largest_ids, *(max(row.input_ids) for row in dataset.rows))
    if largest >= pair.vocabulary:
        token = pair.origin.tokenizer.convert_ids_to_tokens(largest)
        raise VocabularyMismatch(
            f"the text holds the token {token!r} (id {largest}), which the teacher's tokenizer lacks; give a student "
            f"with the teacher's own tokenizer and chat template"
        )


def get_loaded_models(pair: ModelPair) -> list[PreTrainedModel]:
    """The models here that read the text."""
    return [pair.student, *(teacher.model for teacher in pair.teachers.values() if isinstance(teacher, LoadedModel))]


def supports_packing(pair: ModelPair) -> bool:
    """Whether the models here keep packed documents apart, so that nothing has to be padded."""
    return all(probe_model(model).supports_packing for model in get_loaded_models(pair))
