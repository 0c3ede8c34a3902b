"""The student and its teachers in memory, with their tokenizers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from potstill.core.errors import VocabularyMismatch
from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo, inspect_tokenizers
from potstill.data.packing import Packs
from potstill.models.causality import require_causal
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel
from potstill.models.signals import probe_model
from potstill.models.tokenizers.vocabulary import check_token_id, count_usable_ids
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.stages.dataset import PreparedDataset
from potstill.teachers.external import ExternalTeacher


class ModelPair(NamedTuple):
    """The student to train, the model it came from, and its teachers by the name of their network.

    `vocabulary` counts the token ids that all of them share; with two tokenizers (`is_cross_tokenizer`) it is the
    student's own. A teacher without weights here is an `ExternalTeacher`. The first teacher measures the student.
    """

    student: PreTrainedModel
    origin: LoadedModel
    teachers: Mapping[str, LoadedModel | ExternalTeacher]
    vocabulary: int
    parents: list[Any]
    details: dict[str, Any]
    is_cross_tokenizer: bool = False
    needs_teacher_tokens: bool = True  # whether the objective reads the text with the teacher's tokenizer too
    needs_edit_alignment: bool = False
    is_chat: bool = False  # whether the text consists of turns, which each chat template renders differently

    @property
    def teacher(self) -> LoadedModel | ExternalTeacher:
        """The first teacher."""
        return next(iter(self.teachers.values()))

    @property
    def uses_teacher_tokens(self) -> bool:
        """Whether batches contain the teacher's tokens in addition to the student's."""
        return self.is_cross_tokenizer and self.needs_teacher_tokens

    @property
    def loaded_teachers(self) -> dict[str, LoadedModel]:
        """The teachers in memory, by name."""
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, LoadedModel)}

    @property
    def loaded_models(self) -> list[PreTrainedModel]:
        """The student and the teachers in memory."""
        return [self.student, *(teacher.model for teacher in self.loaded_teachers.values())]

    @property
    def supports_packing(self) -> bool:
        """Whether every model in memory isolates packed documents, so that no batch needs padding."""
        return all(probe_model(model).supports_packing for model in self.loaded_models)

    @property
    def pair_info(self) -> PairInfo:
        """Both models, for an objective that depends on their shapes or tokenizers."""
        assert isinstance(self.teacher, LoadedModel)
        student_tokenizer, teacher_tokenizer = self.origin.tokenizer, self.teacher.tokenizer
        return PairInfo(
            ModelInfo(self.student, student_tokenizer),
            ModelInfo(self.teacher.model, teacher_tokenizer),
            self.end_token_ids,
        )

    @property
    def end_token_ids(self) -> tuple[int, int] | None:
        """The ids with which student and teacher end an answer in a chat; None unless each has exactly one."""
        if not (self.is_cross_tokenizer and self.is_chat):
            return None
        student_end, teacher_end = (
            None if reader.chat_markers is None else reader.tokenizer.get_vocab().get(reader.chat_markers.ending)
            for reader in self.readers
        )
        return None if student_end is None or teacher_end is None else (student_end, teacher_end)

    @property
    def vocabulary_sizes(self) -> int | dict[str, int]:
        """The number of shared ids; with two tokenizers, of each network's ids by its name."""
        if not self.is_cross_tokenizer:
            return self.vocabulary
        info = self.pair_info
        return {"student": info.student.vocab_size, "teacher": info.teacher.vocab_size}

    @property
    def readers(self) -> tuple[TokenizerInfo, TokenizerInfo]:
        """The tokenizers of student and teacher, with the markers of their chat templates."""
        assert isinstance(self.teacher, LoadedModel)
        return inspect_tokenizers(self.origin.tokenizer, self.teacher.tokenizer, chats=self.is_chat)

    def limit_vocabulary(self) -> "ModelPair":
        """The pair without ids that have no row in an embedding, such as words added to the tokenizer alone."""
        sizes = [count_usable_ids(self.origin.tokenizer, self.student)]
        if not self.is_cross_tokenizer:
            sizes += [teacher.vocabulary for teacher in self.loaded_teachers.values()]
        return self._replace(vocabulary=min(self.vocabulary, *sizes))

    def prepare_packs(self, packs: Packs, *, prefetch: bool = False) -> Any:
        """`packs` with the teacher's tokens if it needs them; `prefetch` sends requests to a served teacher early."""
        if not self.uses_teacher_tokens:
            return self._prefetch(packs) if prefetch else packs
        assert isinstance(self.teacher, LoadedModel)
        return CrossTokenizerPacks(
            packs,
            *self.readers,
            needs_edit_alignment=self.needs_edit_alignment,
            max_length=get_max_context(self.teacher.model),
        )

    def _prefetch(self, packs: Packs) -> Any:
        prefetched_packs: object = packs
        has_routes = "routes" in packs.fields
        for number, teacher in enumerate(self.teachers.values()):
            if isinstance(teacher, ExternalTeacher):
                prefetched_packs = teacher.prefetch(prefetched_packs, route=number if has_routes else None)
        return prefetched_packs


def check_causality(pair: ModelPair) -> None:
    """Refuse a student or a teacher that sees the next token, which it should predict.

    Raises: UnsupportedModel.
    """
    teachers = {f"the teacher {teacher.name}": teacher.model for teacher in pair.loaded_teachers.values()}
    for name, model in {f"the student {pair.origin.name}": pair.student, **teachers}.items():
        require_causal(model, name)


def check_token_ids(dataset: PreparedDataset, pair: ModelPair) -> None:
    """Refuse text whose token ids exceed those that student and teacher share.

    Raises: VocabularyMismatch.
    """
    largest_ids = [int(packs.input_ids.max(initial=0)) for packs in (dataset.packs, dataset.validation_packs)]
    largest = max(*largest_ids, *(max(row.input_ids) for row in dataset.rows))
    check_token_id(largest, len(pair.student.get_input_embeddings().weight), pair.origin.tokenizer)
    if largest >= pair.vocabulary:
        token = pair.origin.tokenizer.convert_ids_to_tokens(largest)
        raise VocabularyMismatch(
            f"the text contains the token {token!r} (id {largest}), which the teacher's tokenizer lacks; give a "
            f"student with the teacher's own tokenizer and chat template"
        )
