"""A teacher's answers to the prompts of a data set, as a data set: sequence-level distillation trains on them.

    potstill generate TEACHER --data D --out answers
    potstill distill --teacher TEACHER --student S --data answers --objective cross_entropy --out student

The folder holds `train.jsonl` with what the teacher answers to the training prompts (of a chat, to what comes before
its first answer, so that no other answer is trained on), and `validation.jsonl` with the data's own held-out answers,
so that a student of either is measured on the same text.

Source: Kim and Rush, "Sequence-Level Knowledge Distillation" (arXiv:1606.07947), section 3.2. Departs from the paper:
answers are greedy or sampled, not searched by beam.
"""

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from potstill.core import backend
from potstill.core.artefact import TRAINING, Card, clear, read_card, recover, require_free, write_text, writing
from potstill.core.errors import ArtefactError, DataError, Interrupted, OutputExists, UsageError
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.template import ChatTemplate
from potstill.decode.sample import Sampling, complete
from potstill.evaluate.reading import at_rest, context_of
from potstill.evaluate.rouge import question_of
from potstill.models.load import Loaded, load
from potstill.models.vocabulary import real_ids
from potstill.pipeline.rollouts import stops_of
from potstill.pipeline.stage import as_value, command, disk, parent, require_apart, require_one_process
from potstill.pipeline.texts import columns_of
from potstill.train.rollout import generator_of
from potstill.train.run import identify

PART = 64  # prompts of a part; what is whole of them stays when the stage is stopped
IDENTITY = "identity.txt"
SPLITS = ("train", "validation")
HELD_OUT = 1000  # documents of the validation set, at most
EMPTY, CUT, LONG, UNASKED = "an empty answer", "an answer that did not end", "a prompt too long", "no prompt"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What `model` answers to the first `documents` prompts of `data` (0: to all), greedily or at a `temperature`.

    An answer that is empty, or has not ended after `max_tokens`, is left out and counted. Each document has noise of
    its own, so what is answered depends on the seed alone.
    """

    kind: ClassVar[str] = "answers"
    model: str
    data: str
    columns: str = ""
    documents: int = 0
    max_tokens: int = 128
    temperature: float = 0.0
    batch: int = 8
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("documents", 0), ("max_tokens", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.temperature >= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be at least 0, which is greedy")

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return as_value(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
        """Writes the folder, which holds `training/` alone until it is whole; its card.

        Raises: UsageError, NotFound, DataError, OutputExists before anything is written; Interrupted with what was
            answered left for `resume`.
        """
        require_one_process()
        require_apart(out, self.model, self.data)
        if resume and overwrite:
            raise UsageError("--resume continues what is in the folder and --overwrite discards it; give one of them")
        recover(out)
        require_free(out, overwrite=overwrite or resume)
        if resume and (out / "card.json").is_file() and not (out / TRAINING).is_dir():
            return self._finished(out)
        loaded = load(self.model, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        corpora = [load_corpus(self.data, split=split, columns=columns_of(self.columns)) for split in SPLITS]
        documents = self._documents(corpora[0])
        device = backend.device(self.device)
        dtype = backend.dtype(self.dtype, on=str(device))
        loaded.model.to(device=device, dtype=dtype)
        identity = identify(self.to_dict(), loaded.digest, corpora[0].digest, str(dtype), device.type)
        start = time.perf_counter()
        with disk(out), workplace(out, identity=identity, resume=resume) as folder:
            for number, first in enumerate(range(0, len(documents), PART)):
                self._part(folder / f"part-{number:05}.jsonl", loaded, documents[first : first + PART], first)
            return self._finish(out, folder, loaded, corpora, time.perf_counter() - start)

    def _finished(self, out: Path) -> dict[str, Any]:
        found = read_card(out)
        if found.get("stage") != self.to_dict():
            raise OutputExists(f"{out} holds other answers that are whole; pass --overwrite to replace them")
        return found

    def _documents(self, corpus: Corpus) -> list[Mapping[str, Any]]:
        """The documents whose prompts are answered.

        Raises: DataError for plain text; UsageError for a stream without an end.
        """
        if corpus.kind == "text":
            raise DataError(f"{corpus.name} is plain text, which asks nothing; give prompts with responses, or chats")
        if not self.documents and not isinstance(corpus.documents, Dataset):
            raise UsageError(f"{self.data} is streamed and may never end; say with --documents how much of it to read")
        return list(islice(corpus.documents, self.documents or None))

    def _part(self, file: Path, loaded: Loaded, documents: Sequence[Mapping[str, Any]], first: int) -> None:
        """Answers a part, unless it is whole already."""
        if file.exists():
            return
        tokenizer = loaded.tokenizer
        template = ChatTemplate(tokenizer) if tokenizer.chat_template or "messages" in documents[0] else None
        documents = [opening(document) for document in documents]
        asked = [question_of(document, tokenizer, template) for document in documents]
        room = context_of(loaded.model) - self.max_tokens
        prompts = {n: list(one.prompt) for n, one in enumerate(asked) if one is not None and len(one.prompt) <= room}
        written: dict[int, list[int]] = {}
        by_length = sorted(prompts, key=lambda n: len(prompts[n]))
        for start in range(0, len(by_length), self.batch):
            chosen = by_length[start : start + self.batch]
            written |= zip(chosen, self._write(loaded, [prompts[n] for n in chosen], chosen, first), strict=True)
        stop = stops_of(loaded.model, tokenizer)
        lines = [
            {"left_out": UNASKED} if asked[n] is None else line_of(document, written.get(n), stop, tokenizer)
            for n, document in enumerate(documents)
        ]
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _write(
        self, loaded: Loaded, prompts: Sequence[list[int]], numbers: Sequence[int], first: int
    ) -> list[list[int]]:
        sampling = Sampling(
            vocabulary=real_ids(loaded.tokenizer),
            stop=stops_of(loaded.model, loaded.tokenizer),
            temperature=self.temperature,
        )
        device = loaded.model.device
        noise = [torch.rand(self.max_tokens, generator=generator_of(self.seed, first + n, 0)) for n in numbers]
        ids = [torch.tensor(prompt, device=device) for prompt in prompts]
        limits = [self.max_tokens] * len(ids)
        with at_rest(loaded.model):
            return complete([(1.0, loaded.model)], ids, torch.stack(noise).to(device), limits, sampling)

    def _finish(
        self, out: Path, folder: Path, loaded: Loaded, corpora: Sequence[Corpus], seconds: float
    ) -> dict[str, Any]:
        parts = sorted(folder.glob("part-*.jsonl"))
        lines = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
        whole = [line["document"] for line in lines if "document" in line]
        left_out = dict(Counter(line["left_out"] for line in lines if "left_out" in line))
        if not whole:
            shutil.rmtree(folder)
            raise DataError(f"{loaded.name} answers nothing that could be trained on: {left_out}; raise --max-tokens")
        held_out = islice(corpora[1].documents, HELD_OUT)
        with writing(out, overwrite=True) as staging:
            for split, documents in zip(SPLITS, (whole, held_out), strict=True):
                text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
                write_text(staging / f"{split}.jsonl", text)
            card = Card(
                stage=self.to_dict(),
                seed=self.seed,
                parents=[parent("teacher, who answered", loaded)],
                data={"asked": corpora[0].name, "kind": corpora[0].kind, "text_digest": corpora[0].digest},
                cost={"seconds": seconds},
                details={"answers": len(whole), "left_out": left_out},
                command=command(),
            )
            card.write(staging)
        return card.to_dict()


def opening(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair, or a chat up to its first answer: whatever is trained on of it is then the teacher's own."""
    first = next((n for n, turn in enumerate(document.get("messages", ())) if turn["role"] == "assistant"), None)
    return document if first is None else {"messages": document["messages"][: first + 1]}


def line_of(
    document: Mapping[str, Any], tokens: Sequence[int] | None, stop: frozenset[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A line of a part: the document with the answer that the tokens are, or why there is none."""
    if tokens is None:
        return {"left_out": LONG}
    if tokens[-1] not in stop:
        return {"left_out": CUT}
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return {"document": answered(document, text)} if text.strip() else {"left_out": EMPTY}


def answered(document: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A pair with another response, or a chat whose last answer is another."""
    if "messages" not in document:
        return {"prompt": document["prompt"], "response": text}
    last = max(n for n, message in enumerate(document["messages"]) if message["role"] == "assistant")
    return {"messages": [*document["messages"][:last], {"role": "assistant", "content": text}]}


@contextlib.contextmanager
def workplace(out: Path, *, identity: str, resume: bool) -> Iterator[Path]:
    """`out`/training; the parts that are whole in it stay if the stage does not end.

    Raises: ArtefactError where they belong to another stage, Interrupted for Ctrl-C.
    """
    folder = out / TRAINING
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    if not (folder / IDENTITY).exists():
        write_text(folder / IDENTITY, identity)
    if (folder / IDENTITY).read_text(encoding="utf-8") != identity:
        raise ArtefactError(f"{out} holds answers of other settings, models or data; start again with --overwrite")
    try:
        yield folder
    except KeyboardInterrupt:
        if not any(folder.glob("part-*.jsonl")):
            raise
        raise Interrupted(f"stopped; what was answered is kept in {out}, and --resume continues from there") from None
    finally:
        if folder.exists() and not any(folder.glob("part-*.jsonl")):
            shutil.rmtree(folder)
