"""Generates a data set: a teacher's answers to the prompts of another, for sequence-level distillation.

    potstill generate TEACHER --data D --out answers
    potstill distill --teacher TEACHER --student S --data answers --objective cross_entropy --out student

`train.jsonl` holds the teacher's answers to the training prompts. A chat is cut after its first answer, so that every
trained answer is the teacher's. `validation.jsonl` holds the original held-out answers, so that all students are
measured on the same text.

Source: Kim and Rush, "Sequence-Level Knowledge Distillation" (arXiv:1606.07947), section 3.2. Departs from the paper:
answers are greedy or sampled, without beam search.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset

from potstill.core.atomic_files import CARD_FILE, TRAINING_FOLDER, atomic_folder, write_text
from potstill.core.card import Card, Parent, read_card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import DataError, OutputExists, UsageError
from potstill.data.corpus import Corpus
from potstill.data.turns import is_trained, to_message, to_row
from potstill.models.load import load_model
from potstill.stages.answer_writer import AnswerWriter, Line, load_part
from potstill.stages.console import explain_write_errors, get_command
from potstill.stages.corpus import load_data
from potstill.stages.generate_options import GenerateDatasetOptions, check_rewriting
from potstill.stages.option_checks import check_single_process
from potstill.stages.preflight import StageInputs
from potstill.stages.rewrite_prompts import rewrite_prompts
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_record import RunRecord
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.text_options import prepare_tokenizer

PROMPTS_PER_PART = 64  # finished parts stay when the stage is stopped
SPLITS = ("train", "validation")
MAX_VALIDATION_DOCUMENTS = 1000  # of the validation set


@dataclass(frozen=True, kw_only=True)
class GenerateDatasetConfig(GenerateDatasetOptions):
    """Answers of `model` to the first `documents` prompts of `data` (0: all), greedy or sampled at a `temperature`.

    An answer that is empty, or has no stop token within `max_tokens`, is left out and counted. Each document has its
    own random numbers, so the answers depend on the seed and not on the batch size.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "answers"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in (("documents", 0), ("max_tokens", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if not self.temperature >= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be at least 0 (0 is greedy)")
        check_rewriting(self)

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
        """Writes the data set to `out`, which holds only `training/` until it is complete, and returns its card.

        Raises: UsageError, NotFound, DataError, OutputExists before anything is written; Interrupted with the finished
            parts left for `resume`.
        """
        check_single_process()
        with reserve_output(
            out,
            self.inputs,
            overwrite=overwrite,
            resume=resume,
            options=self.to_dict(),
            resumable=(TRAINING_FOLDER, CARD_FILE),
        ):
            if resume and (out / CARD_FILE).is_file() and not (out / TRAINING_FOLDER).is_dir():
                return self._read_finished_card(out)
            return self._write(out, overwrite=not resume)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return StageInputs(models=(self.model,), data=(self.data,))

    def _write(self, out: Path, *, overwrite: bool) -> dict[str, Any]:
        """Writes the data set, or with `overwrite` off what is missing of it."""
        loaded = load_model(self.model, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        saved = None if overwrite else RunRecord.from_folder(out / TRAINING_FOLDER)
        text_facts = prepare_tokenizer(loaded.tokenizer, self, origins=None if saved is None else saved.origins)
        corpora = [load_data(self, split=split) for split in SPLITS]
        documents = self.select_documents(corpora[0])
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device_type=str(device))
        loaded.move_to(device, dtype)
        origins = {"model": loaded.digest, "text": corpora[0].digest, "dtype": str(dtype), "device": device.type}
        template = str(loaded.tokenizer.chat_template)  # of which the text above holds nothing
        origins |= {"template": hashlib.sha256(template.encode()).hexdigest(), **text_facts}
        record = RunRecord(options=self.to_dict(), origins=origins)
        writer, start = AnswerWriter(loaded, self), time.perf_counter()
        with (
            explain_write_errors(out),
            explain_interrupt(out, saved="every finished part", is_resumable=has_finished_part),
            training_folder(out, record, overwrite=overwrite, is_resumable=has_finished_part) as folder,
        ):
            documents, facts = self._answer_documents(writer, documents, folder)
            parents, seconds = [make_parent("teacher, who answered", loaded)], time.perf_counter() - start
            return self._publish(out, documents, corpora, facts, parents, seconds)

    def _answer_documents(
        self, writer: AnswerWriter, documents: Sequence[Mapping[str, Any]], folder: Path
    ) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
        """The answered documents of all parts, and the facts for the card."""
        rewritten = rewrite_prompts(self, writer, documents, folder, size=PROMPTS_PER_PART)
        lines: list[Line] = []
        for number, offset in enumerate(range(0, len(rewritten.documents), PROMPTS_PER_PART)):
            part = rewritten.documents[offset : offset + PROMPTS_PER_PART]
            lines += load_part(folder / f"part-{number:05}.jsonl", partial(self._write_part, writer, part, offset))
        answered_documents = [line["document"] for line in lines if "document" in line]
        skip_counts = dict(rewritten.drop_counts + Counter(line["left_out"] for line in lines if "left_out" in line))
        if not answered_documents:
            shutil.rmtree(folder)
            raise DataError(f"{self.model} gives no answer that could be trained on: {skip_counts}; raise --max-tokens")
        return answered_documents, {"answers": len(answered_documents), "left_out": skip_counts, **rewritten.facts}

    def _read_finished_card(self, out: Path) -> dict[str, Any]:
        card = read_card(out)
        if card.get("stage") != self.to_dict():
            raise OutputExists(f"{out} holds other answers, which are complete; choose another --out")
        return card

    def select_documents(self, corpus: Corpus) -> list[Mapping[str, Any]]:
        """The documents whose prompts the model answers.

        Raises: DataError for plain text; UsageError for a stream without a limit.
        """
        if corpus.kind == "text":
            raise DataError(f"{corpus.name} is plain text, which has no prompts; give prompts with responses, or chats")
        if not self.documents and not isinstance(corpus.documents, Dataset):
            raise UsageError(f"{self.data} is streamed and may never end; limit it with --documents")
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

    def _publish(
        self,
        out: Path,
        answered_documents: Sequence[Mapping[str, Any]],
        corpora: Sequence[Corpus],
        facts: dict[str, Any],
        parents: Sequence[Parent],
        seconds: float,
    ) -> dict[str, Any]:
        validation_documents = islice(corpora[1].documents, MAX_VALIDATION_DOCUMENTS)
        with atomic_folder(out, overwrite=True) as staging_folder:
            for split, documents in zip(SPLITS, (answered_documents, validation_documents), strict=True):
                text = "".join(json.dumps(to_row(document), ensure_ascii=False) + "\n" for document in documents)
                write_text(staging_folder / f"{split}.jsonl", text)
            card = Card(
                stage=self.to_dict(),
                seed=self.seed,
                parents=parents,
                data={"asked": corpora[0].name, "kind": corpora[0].kind, "text_digest": corpora[0].digest},
                cost={"seconds": seconds},
                details=facts,
                command=get_command(),
            )
            card.write(staging_folder)
        return card.to_dict()


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


def has_finished_part(folder: Path) -> bool:
    """Whether a training folder holds a finished part, of answers or of rewritten prompts."""
    return any(folder.glob("*-*.jsonl"))
