"""A student and its teacher in memory, and how both read one text."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from potstill.core.errors import VocabularyMismatch
from potstill.data.pack import Packs
from potstill.data.pairs import Paired, Reader, readers
from potstill.evaluate.reading import context_of
from potstill.models.load import Loaded
from potstill.models.signals import network
from potstill.objectives.sides import Side, Sides
from potstill.pipeline.absent import Absent
from potstill.pipeline.texts import Prepared


class Pair(NamedTuple):
    """The student to be trained with its tokenizer and origin, the teacher or what stands for it, and shared ids.

    `across` tokenizers no id is shared, and `vocabulary` is the student's own. Of `several` teachers `teacher` is the
    first.
    """

    student: PreTrainedModel
    origin: Loaded
    teacher: Loaded | Absent
    vocabulary: int
    parents: list[Any]
    details: dict[str, Any]
    across: bool = False
    paired: bool = True  # whether a teacher of another tokenizer has to read along
    warped: bool = False
    chats: bool = False  # whether the text that is read is of turns, which each template writes in its own way
    several: Mapping[str, Loaded | Absent] = MappingProxyType({})

    @property
    def teachers(self) -> Mapping[str, Loaded | Absent]:
        """Every teacher, by its name among the networks of a study."""
        return self.several or {"teacher": self.teacher}

    @property
    def sides(self) -> Sides:
        """Both networks, for an objective that has to know them."""
        assert isinstance(self.teacher, Loaded)
        student, teacher = self.origin.tokenizer, self.teacher.tokenizer
        return Sides(Side(self.student, student), Side(self.teacher.model, teacher), self.ends)

    @property
    def ends(self) -> tuple[int, int] | None:
        """The ids by which student and teacher end an answer in a chat; None where that is no one token of each."""
        if not (self.across and self.chats):
            return None
        student, teacher = (
            None if reader.marks is None else reader.tokenizer.get_vocab().get(reader.marks.ending)
            for reader in self.readers
        )
        return None if student is None or teacher is None else (student, teacher)

    @property
    def vocabularies(self) -> int | dict[str, int]:
        """The real ids that are shared, or of each network by its name."""
        if not self.across:
            return self.vocabulary
        sides = self.sides
        return {"student": sides.student.ids, "teacher": sides.teacher.ids}

    def packs(self, packs: Packs, *, ahead: bool = False) -> Any:
        """`packs` as both read them; a teacher that is not here is asked about them `ahead` of time."""
        if not (self.across and self.paired):
            return self._ahead(packs) if ahead else packs
        assert isinstance(self.teacher, Loaded)
        return Paired(packs, *self.readers, warped=self.warped, longest=context_of(self.teacher.model))

    @property
    def readers(self) -> tuple[Reader, Reader]:
        """Student and teacher, as they read the text."""
        assert isinstance(self.teacher, Loaded)
        return readers(self.origin.tokenizer, self.teacher.tokenizer, chats=self.chats)

    def _ahead(self, packs: Packs) -> Any:
        asked: object = packs
        for number, one in enumerate(self.teachers.values()):
            if isinstance(one, Absent):
                asked = one.ahead(asked, route=None if packs.routes is None else number)
        return asked


def require_known(text: Prepared, pair: Pair) -> None:
    """Refuse text that the student's tokenizer reads with tokens that the teacher's does not have.

    Raises: VocabularyMismatch.
    """
    packed = [int(packs.input_ids.max(initial=0)) for packs in (text.packs, text.validation_packs)]
    largest = max(*packed, *(max(row.input_ids) for row in text.rows))
    if largest >= pair.vocabulary:
        token = pair.origin.tokenizer.convert_ids_to_tokens(largest)
        raise VocabularyMismatch(
            f"the text holds the token {token!r} (id {largest}), which the teacher's tokenizer lacks; give a student "
            f"with the teacher's own tokenizer and chat template"
        )


def models_of(pair: Pair) -> list[PreTrainedModel]:
    """The models here that read the text."""
    return [pair.student, *(one.model for one in pair.teachers.values() if isinstance(one, Loaded))]


def packed(pair: Pair) -> bool:
    """Whether the models here keep packed documents apart, so that nothing has to be padded."""
    return all(network(model).packs for model in models_of(pair))
