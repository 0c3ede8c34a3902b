"""Measuring models side by side: one text, one teacher read once, every model on the same documents."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core import backend
from potstill.core.artefact import write_text
from potstill.core.errors import DataError, UsageError
from potstill.core.types import Measure
from potstill.data.corpus import Corpus, load_corpus
from potstill.evaluate.agreement import Comparison, Remembered, compare, remember
from potstill.evaluate.bootstrap import interval, paired
from potstill.evaluate.latency import time_model
from potstill.evaluate.perplexity import Scores, score
from potstill.evaluate.reading import Reading, Row
from potstill.evaluate.rouge import Question, judge_answers, prompt_ids
from potstill.evaluate.size import bytes_on_disk, count_parameters
from potstill.models.load import Loaded, load
from potstill.models.vocabulary import shared_ids
from potstill.pipeline.stage import as_value
from potstill.pipeline.texts import rows_of


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """`models` on held-out documents of `data`, beside `teacher` if there is one.

    Bits per byte and perplexity; with a teacher of the same vocabulary KL to it and agreement with it; ROUGE-L where
    the data holds prompts and responses; parameters, bytes, and tokens/s unless `speed` is off.
    """

    models: tuple[str, ...]
    data: str = "stdlib"
    teacher: str | None = None
    documents: int = 100
    context: int = 512
    prompts: int = 20
    speed: bool = True
    tasks: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 1
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise UsageError(f"--documents is {self.documents}; at least one is needed")
        if twice := [n for n in self.models if self.models.count(n) > 1]:
            raise UsageError(f"{twice[0]} is named twice; name each model once")

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return as_value(self)

    def run(self, out: Path | None = None) -> dict[str, Any]:
        """`{"models": {NAME: [measures]}, "paired": [...], "data": {...}}`; written to `out` too if it is given."""
        corpus = load_corpus(self.data, split="validation")
        teacher = None if self.teacher is None else self._load(self.teacher)
        remembered: dict[int, tuple[Sequence[Row], Remembered]] = {}
        found: dict[str, list[Measure]] = {}
        seen: dict[str, Comparison | Scores] = {}
        for name in self.models:
            loaded = teacher if teacher is not None and name == self.teacher else self._load(name)
            vocabulary = len(loaded.tokenizer)
            if teacher is None:
                seen[name] = score(loaded.model, self._rows(corpus, loaded), self.reading(vocabulary))
            else:
                vocabulary = shared_ids(teacher.tokenizer, loaded.tokenizer)
                if vocabulary not in remembered:
                    rows = self._rows(corpus, teacher)
                    remembered[vocabulary] = rows, remember(teacher.model, rows, self.reading(vocabulary))
                seen[name] = compare(remembered[vocabulary][1], loaded.model)
            found[name] = self._measures(seen[name], loaded, corpus)
        result = {
            "models": {name: [m.to_dict() for m in measures] for name, measures in found.items()},
            "paired": differences(seen),
            "data": {"name": corpus.name, "digest": corpus.digest, "documents": self.documents, **corpus.provenance},
            "stage": self.to_dict(),
        }
        if out is not None:
            write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return result

    def reading(self, vocabulary: int) -> Reading:
        """How the documents are read."""
        kind = backend.dtype(self.dtype, on=str(backend.device(self.device)))
        return Reading(context=self.context, vocabulary=vocabulary, dtype=kind)

    def _load(self, name: str) -> Loaded:
        return load(
            name,
            device=backend.device(self.device),
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )

    def _rows(self, corpus: Corpus, loaded: Loaded) -> Sequence[Row]:
        return rows_of(corpus, loaded.tokenizer, documents=self.documents)

    def _measures(self, seen: Comparison | Scores, loaded: Loaded, corpus: Corpus) -> list[Measure]:
        measures = quality(seen)
        if corpus.kind == "pairs" and self.prompts:
            measures.append(answers(loaded.model, loaded.tokenizer, corpus, limit=self.prompts))
        measures += sizes(loaded)
        if self.speed:
            measures += speeds(loaded)
        if self.tasks:
            from potstill.evaluate.harness import run_tasks

            measures += run_tasks(loaded.model, loaded.tokenizer, self.tasks)
        return measures


def quality(seen: Comparison | Scores) -> list[Measure]:
    """Bits per byte and perplexity, and beside a teacher KL and agreement, each with its interval over documents."""
    scores = seen.scores if isinstance(seen, Comparison) else seen
    bits = scores.nll / math.log(2)
    found = [
        _measure("bits_per_byte", bits, scores.sizes, "bits/byte"),
        _measure("perplexity", scores.nll, scores.tokens, "1", transform=np.exp),
    ]
    if isinstance(seen, Comparison):
        found.append(_measure("teacher_kl", seen.kl, scores.tokens, "nats/token"))
        found.append(_measure("teacher_agreement", seen.agreed, scores.tokens, "share", better="higher"))
    return found


def sizes(loaded: Loaded) -> list[Measure]:
    """Stored parameters and bytes of weights on disk."""
    found = count_parameters(loaded.model)
    note = f"{found.blocks:,} in blocks, {found.embeddings:,} in embeddings"
    stored = bytes_on_disk(loaded.path)
    return [
        Measure("parameters", found.total, "parameters", found.total, note=note),
        Measure("bytes", stored, "B", 1, note=loaded.note),
    ]


def speeds(loaded: Loaded) -> list[Measure]:
    """Prefill and decode tokens/s, medians with the range of the runs, and peak memory."""
    speed = time_model(loaded.model)
    found = [
        Measure(
            name,
            float(np.median(runs)),
            "tokens/s",
            len(runs),
            "higher",
            float(runs.min()),
            float(runs.max()),
            f"{speed.conditions}; range of the runs",
        )
        for name, runs in (("prefill_tokens_per_second", speed.prefill), ("decode_tokens_per_second", speed.decode))
    ]
    return [*found, Measure("peak_memory", speed.peak_memory, "B", 1, note=speed.conditions)]


def differences(seen: Mapping[str, Comparison | Scores]) -> list[dict[str, Any]]:
    """For every pair of models read on the same rows: a - b by paired bootstrap over documents."""
    found = []
    for (a, left), (b, right) in itertools.combinations(seen.items(), 2):
        for name, numerator, denominator in _shared(left, right):
            gap = paired(numerator[0], numerator[1], denominator)
            found.append({"name": name, "a": a, "b": b, **gap._asdict()})
    return found


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, *, limit: int) -> Measure:
    """ROUGE-L F1 times 100 of greedy answers to the first `limit` prompts."""
    asked = corpus.documents.take(limit)
    questions = [Question(prompt_ids(one["prompt"], tokenizer), [one["response"]]) for one in asked]
    if not questions:
        raise DataError(f"{corpus.name} holds no prompt to answer")
    found = judge_answers(model, tokenizer, questions).rouge_l
    return _measure("rouge_l", found, np.ones_like(found), "F1 x 100", better="higher")


def _measure(
    name: str, above: Any, below: Any, unit: str, *, better: str = "lower", transform: Any = np.asarray
) -> Measure:
    value, low, high = interval(np.asarray(above, float), np.asarray(below, float), transform=transform)
    ends = (None, None) if math.isnan(low) else (low, high)
    return Measure(name, value, unit, len(above), better, *ends, note="interval over documents")


def _shared(left: Comparison | Scores, right: Comparison | Scores) -> list[tuple[str, tuple[Any, Any], Any]]:
    a, b = (x.scores if isinstance(x, Comparison) else x for x in (left, right))
    if not np.array_equal(a.sizes, b.sizes):
        return []
    found = [("bits_per_byte", (a.nll / math.log(2), b.nll / math.log(2)), a.sizes.astype(float))]
    if isinstance(left, Comparison) and isinstance(right, Comparison):
        tokens = a.tokens.astype(float)
        found.append(("teacher_kl", (left.kl, right.kl), tokens))
        found.append(("teacher_agreement", (left.agreed, right.agreed), tokens))
    return found
