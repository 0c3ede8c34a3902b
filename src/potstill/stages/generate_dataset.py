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
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.core.atomic_files import CARD_FILE, TRAINING_FOLDER, atomic_folder, write_text
from potstill.core.card import Card, read_card
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import DataError, OutputExists, UsageError
from potstill.data.corpus import Corpus
from potstill.data.prompts import PromptTokenizer
from potstill.data.turns import is_trained, to_message, to_row
from potstill.decode.generate import generate
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.evaluate.rouge import find_question
from potstill.models.inference import get_max_context, inference_context
from potstill.models.load import LoadedModel, load_model
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.stages.console import explain_write_errors, get_command
from potstill.stages.corpus import load_data
from potstill.stages.generate_options import GenerateDatasetOptions
from potstill.stages.option_checks import check_single_process
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_record import RunRecord
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.stages.text_options import prepare_tokenizer
from potstill.train.rollouts.base import make_generator

PROMPTS_PER_PART = 64  # finished parts stay when the stage is stopped
SPLITS = ("train", "validation")
MAX_VALIDATION_DOCUMENTS = 1000  # of the validation set
EMPTY_ANSWER, TRUNCATED_ANSWER, PROMPT_TOO_LONG = ("an empty answer", "an answer that did not end", "a prompt too long")


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
        start = time.perf_counter()
        with (
            explain_write_errors(out),
            explain_interrupt(out, saved="every finished part", is_resumable=has_finished_part),
            training_folder(out, record, overwrite=overwrite, is_resumable=has_finished_part) as folder,
        ):
            for number, offset in enumerate(range(0, len(documents), PROMPTS_PER_PART)):
                self._write_part(
                    folder / f"part-{number:05}.jsonl", loaded, documents[offset : offset + PROMPTS_PER_PART], offset
                )
            return self._publish(out, folder, loaded, corpora, time.perf_counter() - start)

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

    def _write_part(self, file: Path, loaded: LoadedModel, documents: Sequence[Mapping[str, Any]], offset: int) -> None:
        """Writes a part, unless it is finished already."""
        if file.exists():
            return
        tokenizer = loaded.tokenizer
        prompt_tokenizer = PromptTokenizer(
            tokenizer, special_in_text=self.special_in_text, needs_template="messages" in documents[0]
        )
        documents = [truncate_to_first_answer(document) for document in documents]
        questions = [find_question(document, prompt_tokenizer, on_bad_row=self.on_bad_row) for document in documents]
        max_prompt_tokens = get_max_context(loaded.model) - self.max_tokens
        prompts = {
            n: list(question.prompt)
            for n, question in enumerate(questions)
            if not isinstance(question, str) and len(question.prompt) <= max_prompt_tokens
        }
        stop_tokens = require_stop_tokens(loaded.model, tokenizer)
        sampling = Sampling(vocabulary=count_token_ids(tokenizer), stop=stop_tokens, temperature=self.temperature)
        answers: dict[int, list[int]] = {}
        by_length = sorted(prompts, key=lambda n: len(prompts[n]))
        for start in range(0, len(by_length), self.batch):
            indices = by_length[start : start + self.batch]
            numbers = [offset + n for n in indices]
            completions = self._generate_answers(loaded, [prompts[n] for n in indices], numbers, sampling)
            answers |= zip(indices, completions, strict=True)
        lines = [
            {"left_out": question}
            if isinstance(question, str)
            else format_line(document, answers.get(n), stop_tokens, tokenizer)
            for n, (document, question) in enumerate(zip(documents, questions, strict=True))
        ]
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _generate_answers(
        self, loaded: LoadedModel, prompts: Sequence[list[int]], numbers: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        device = loaded.model.device
        noise = [torch.rand(self.max_tokens, generator=make_generator(self.seed, number, 0)) for number in numbers]
        ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        limits = [self.max_tokens] * len(ids)
        with inference_context(loaded.model):
            return generate([(1.0, loaded.model)], ids, torch.stack(noise).to(device), limits, sampling)

    def _publish(
        self, out: Path, folder: Path, loaded: LoadedModel, corpora: Sequence[Corpus], seconds: float
    ) -> dict[str, Any]:
        parts = sorted(folder.glob("part-*.jsonl"))
        lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        answered_documents = [line["document"] for line in lines if "document" in line]
        skip_counts = dict(Counter(line["left_out"] for line in lines if "left_out" in line))
        if not answered_documents:
            shutil.rmtree(folder)
            raise DataError(
                f"{loaded.name} gives no answer that could be trained on: {skip_counts}; raise --max-tokens"
            )
        validation_documents = islice(corpora[1].documents, MAX_VALIDATION_DOCUMENTS)
        with atomic_folder(out, overwrite=True) as staging_folder:
            for split, documents in zip(SPLITS, (answered_documents, validation_documents), strict=True):
                text = "".join(json.dumps(to_row(document), ensure_ascii=False) + "\n" for document in documents)
                write_text(staging_folder / f"{split}.jsonl", text)
            card = Card(
                stage=self.to_dict(),
                seed=self.seed,
                parents=[make_parent("teacher, who answered", loaded)],
                data={"asked": corpora[0].name, "kind": corpora[0].kind, "text_digest": corpora[0].digest},
                cost={"seconds": seconds},
                details={"answers": len(answered_documents), "left_out": skip_counts},
                command=get_command(),
            )
            card.write(staging_folder)
        return card.to_dict()


def truncate_to_first_answer(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair as it is, or a chat up to its first answer, so that only the teacher's answer is trained on."""
    turns = document.get("messages", ())
    first_answer = next((n for n, turn in enumerate(turns) if is_trained(to_message(turn))), None)
    return document if first_answer is None else {**document, "messages": document["messages"][: first_answer + 1]}


def format_line(
    document: Mapping[str, Any],
    tokens: Sequence[int] | None,
    stop_tokens: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """A line of a part: the document with the generated answer, or the reason why it is left out."""
    if tokens is None:
        return {"left_out": PROMPT_TOO_LONG}
    if tokens[-1] not in stop_tokens:
        return {"left_out": TRUNCATED_ANSWER}
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return {"document": replace_answer(document, text)} if text.strip() else {"left_out": EMPTY_ANSWER}


def replace_answer(document: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The document with `text` as its response or last answer."""
    if "messages" not in document:
        return {"prompt": document["prompt"], "response": text}
    last_answer = max(n for n, message in enumerate(document["messages"]) if message["role"] == "assistant")
    messages = [*document["messages"][:last_answer], {"role": "assistant", "content": text}]
    return to_row({**document, "messages": messages})


def has_finished_part(folder: Path) -> bool:
    """Whether a training folder holds a finished part."""
    return any(folder.glob("part-*.jsonl"))
