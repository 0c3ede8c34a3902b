"""Generates a data set: a teacher's answers to the prompts of another, for sequence-level distillation.

    potstill generate TEACHER --data D --out answers
    potstill distill --teacher TEACHER --student S --data answers --objective cross_entropy --out student

`train.jsonl` holds the teacher's answers to the training prompts. A chat is cut after its first answer, so that every
trained answer is the teacher's. `validation.jsonl` holds the original held-out answers, so that all students are
measured on the same text.

Source: Kim and Rush, "Sequence-Level Knowledge Distillation" (arXiv:1606.07947), section 3.2. Departs from the paper:
answers are greedy or sampled, without beam search.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from potstill.core.errors import DataError, UsageError
from potstill.data.corpus import Corpus
from potstill.data.turns import is_trained, to_message, to_row
from potstill.models.load import LoadedModel
from potstill.stages.answer_writer import AnswerWriter
from potstill.stages.corpus import load_data
from potstill.stages.dataset_parts import (
    PROMPTS_PER_PART,
    SPLITS,
    DatasetJob,
    DatasetStage,
    GeneratedDataset,
    load_parts,
)
from potstill.stages.generate_options import GenerateDatasetOptions, check_rewriting
from potstill.stages.rewrite_prompts import rewrite_prompts

MAX_VALIDATION_DOCUMENTS = 1000  # of the validation set


@dataclass(frozen=True, kw_only=True)
class GenerateDatasetConfig(GenerateDatasetOptions, DatasetStage):
    """Answers of `model` to the first `documents` prompts of `data` (0: all), greedy or sampled at a `temperature`.

    An answer that is empty, or has no stop token within `max_tokens`, is left out and counted. Each document has its
    own random numbers, so the answers depend on the seed and not on the batch size.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "answers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature >= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be at least 0 (0 is greedy)")
        check_rewriting(self)

    def prepare(self) -> DatasetJob:
        """The documents to answer. Raises: NotFound, DataError as `load_data` does, and as `select_documents`."""
        corpus, held_out = (load_data(self, split=split) for split in SPLITS)
        return DatasetJob(
            write=partial(self._answer_documents, self.select_documents(corpus), held_out),
            role="teacher, who answered",
            data={"asked": corpus.name, "kind": corpus.kind, "text_digest": corpus.digest},
        )

    def _answer_documents(
        self, documents: Sequence[Mapping[str, Any]], held_out: Corpus, loaded: LoadedModel, folder: Path
    ) -> GeneratedDataset:
        """The answered documents of all parts, the held-out ones as they are, and the facts for the card."""
        writer, size = AnswerWriter(loaded, self), PROMPTS_PER_PART
        rewritten = rewrite_prompts(self, writer, documents, folder, size=size)
        lines = load_parts(folder, "part", rewritten.documents, partial(self._write_part, writer), size=size)
        answered_documents = [to_row(line["document"]) for line in lines if "document" in line]
        skip_counts = dict(rewritten.drop_counts + Counter(line["left_out"] for line in lines if "left_out" in line))
        if not answered_documents:
            raise DataError(f"{self.model} gives no answer that could be trained on: {skip_counts}; raise --max-tokens")
        facts = {"answers": len(answered_documents), "left_out": skip_counts, **rewritten.facts}
        validation = [to_row(document) for document in islice(held_out.documents, MAX_VALIDATION_DOCUMENTS)]
        return GeneratedDataset(answered_documents, validation, facts)

    def select_documents(self, corpus: Corpus) -> list[Mapping[str, Any]]:
        """The documents whose prompts the model answers.

        Raises: DataError for plain text; UsageError for a stream without a limit.
        """
        if corpus.kind == "text":
            raise DataError(f"{corpus.name} is plain text, which has no prompts; give prompts with responses, or chats")
        if not self.documents and not isinstance(corpus.documents, Dataset):
            raise UsageError(f"{corpus.name} is streamed and may never end; limit it with --documents")
        return list(islice(corpus.documents, self.documents or None))

    def _write_part(
        self, writer: AnswerWriter, documents: Sequence[Mapping[str, Any]], offset: int
    ) -> list[dict[str, Any]]:
        """The lines of a part: each document with the generated answer, or the reason why it is left out."""
        cut_documents = {offset + n: truncate_to_first_answer(document) for n, document in enumerate(documents)}
        answers = writer.answer(cut_documents)
        return [
            {"left_out": answer.lack} if answer.lack else {"document": replace_answer(cut_documents[n], answer.text)}
            for n, answer in answers.items()
        ]


def truncate_to_first_answer(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair as it is, or a chat up to its first answer, so that only the teacher's answer is trained on."""
    turns = document.get("messages", ())
    first_answer = next((n for n, turn in enumerate(turns) if is_trained(to_message(turn))), None)
    return document if first_answer is None else {**document, "messages": document["messages"][: first_answer + 1]}


def replace_answer(document: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The document with `text` as its response or last answer."""
    if "messages" not in document:
        return {**document, "response": text}
    last_answer = max(n for n, message in enumerate(document["messages"]) if message["role"] == "assistant")
    messages = [*document["messages"][:last_answer], {"role": "assistant", "content": text}]
    return to_row({**document, "messages": messages})
