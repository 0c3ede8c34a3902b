"""A model's measures, quality and cost, with the names and units that cards, tables and the frontier share.

| name | unit | better | over |
|---|---|---|---|
| `bits_per_byte` | bits/byte | lower | documents |
| `perplexity` | per token | lower | documents |
| `teacher_kl` | nats/token | lower | documents |
| `teacher_agreement` | share | higher | documents |
| `rouge_l` | points | higher | prompts |
| `parameters`, `bytes` | parameters, bytes | lower | 1 |
| `prefill_tokens_per_second`, `decode_tokens_per_second` | tokens/s | higher | runs |
| `peak_memory` | bytes | lower | 1 |

Intervals of quality are 95 % bootstrap intervals over documents; those of speed are the slowest and the fastest run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import NotFound, UsageError, VocabularyMismatch
from potstill.core.types import Measure
from potstill.data.chat import tokenise
from potstill.data.corpus import Corpus
from potstill.evaluate.agreement import Comparison, Remembered, compare, remember
from potstill.evaluate.bootstrap import Interval, interval, paired
from potstill.evaluate.latency import Speed, Trial, time_model
from potstill.evaluate.perplexity import Scores, score, supervised_rows, text_rows
from potstill.evaluate.reading import Reading, Row
from potstill.evaluate.rouge import Answers, Question, Writing, judge_answers, questions
from potstill.evaluate.size import bytes_in_memory, bytes_on_disk, count_parameters
from potstill.models.load import Loaded
from potstill.models.vocabulary import shared_ids

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """How models are measured: read, timed (`trial` None does not time) and let write; `seed` is the bootstrap's."""

    reading: Reading = field(default_factory=Reading)
    trial: Trial | None = field(default_factory=Trial)
    writing: Writing = field(default_factory=Writing)
    seed: int = 0


@dataclass(frozen=True)
class Teacher:
    """A teacher and what it said about the rows on which students are compared with it."""

    loaded: Loaded
    remembered: Remembered


@dataclass(frozen=True)
class Judged:
    """The measures of a model, with what they were computed from, document by document."""

    name: str
    measures: Sequence[Measure]
    scores: Scores
    comparison: Comparison | None = None
    answers: Answers | None = None


def measure(
    loaded: Loaded,
    rows: Sequence[Row],
    *,
    teacher: Teacher | None = None,
    asked: Sequence[Question] = (),
    yardstick: Yardstick | None = None,
) -> list[Measure]:
    """All measures of one model on `rows`; KL and agreement with a `teacher`, ROUGE-L with questions to ask."""
    return list(judge(loaded, rows, teacher=teacher, asked=asked, yardstick=yardstick).measures)


def judge(
    loaded: Loaded,
    rows: Sequence[Row],
    *,
    teacher: Teacher | None = None,
    asked: Sequence[Question] = (),
    yardstick: Yardstick | None = None,
) -> Judged:
    """What `measure` returns, with what two models need to be compared on the same documents.

    Raises:
        VocabularyMismatch: the teacher reads text as other tokens.
        UsageError: the teacher listened to other rows.
        DataError: there is nothing to score.
    """
    yardstick = yardstick or Yardstick()
    if teacher is not None and list(teacher.remembered.rows) != list(rows):
        raise UsageError(f"{teacher.loaded.name} has read other documents; let it listen to those that are measured")
    comparison = None if teacher is None else _beside(teacher, loaded)
    reading = replace(yardstick.reading, vocabulary=real_ids(loaded.tokenizer))
    scores = score(loaded.model, rows, reading) if comparison is None else comparison.scores
    measures = quality(scores, seed=yardstick.seed)
    if comparison is not None:
        measures += nearness(comparison, seed=yardstick.seed)
    answers = None
    if asked:
        answers = judge_answers(loaded.model, loaded.tokenizer, asked, writing=yardstick.writing)
        measures.append(_rouge(answers, seed=yardstick.seed))
    measures += weight(loaded)
    if yardstick.trial is not None:
        measures += pace(time_model(loaded.model, yardstick.trial))
    return Judged(loaded.name, measures, scores, comparison, answers)


def judge_all(
    models: Mapping[str, Loaded],
    corpus: Corpus,
    *,
    teacher: Loaded | None = None,
    yardstick: Yardstick | None = None,
    tokens: int | None = None,
    prompts: int = 0,
) -> dict[str, Judged]:
    """Every model on the first `tokens` tokens of `corpus` and, where it asks something, its first `prompts` prompts.

    The teacher reads the rows once for all. Models with another tokenizer than the teacher's are measured without KL
    and agreement. Windows fit the shortest context among all, so that every model sees the same.
    """
    yardstick = yardstick or Yardstick()
    everyone = [*models.values(), *([teacher] if teacher else [])]
    yardstick = replace(yardstick, reading=yardstick.reading.within(*(loaded.model for loaded in everyone)))
    taught = None if teacher is None else listen(teacher, rows_of(corpus, teacher.tokenizer, tokens=tokens), yardstick)
    judged = {}
    for name, loaded in models.items():
        asked = questions(corpus, loaded.tokenizer, limit=prompts) if prompts and corpus.kind != "text" else []
        known = taught if taught is not None and reads_alike(taught.loaded, loaded) else None
        rows = known.remembered.rows if known else rows_of(corpus, loaded.tokenizer, tokens=tokens)
        found = judge(loaded, rows, teacher=known, asked=asked, yardstick=yardstick)
        judged[name] = replace(found, name=name)
    return judged


def listen(teacher: Loaded, rows: Sequence[Row], yardstick: Yardstick | None = None) -> Teacher:
    """Let `teacher` read `rows` once, for any number of students."""
    reading = replace((yardstick or Yardstick()).reading, vocabulary=real_ids(teacher.tokenizer))
    return Teacher(teacher, remember(teacher.model, rows, reading))


def reads_alike(teacher: Loaded, student: Loaded) -> bool:
    """Whether both read text as the same tokens."""
    try:
        shared_ids(teacher.tokenizer, student.tokenizer)
    except VocabularyMismatch:
        return False
    return True


def rows_of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, tokens: int | None = None) -> list[Row]:
    """The documents of `corpus`, up to the one with which `tokens` are reached; of chats and pairs the answers count."""
    if corpus.kind != "text":
        return supervised_rows(tokenise(corpus, tokenizer, limit=tokens), tokenizer)
    rows: list[Row] = []
    read = 0
    for text in corpus.texts():
        rows += text_rows([text], tokenizer)
        read += len(rows[-1].input_ids)
        if tokens is not None and read >= tokens:
            break
    return rows


def real_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids stand for a token; a head may have more rows."""
    return max(tokenizer.get_vocab().values()) + 1


def quality(scores: Scores, *, seed: int = 0) -> list[Measure]:
    """`bits_per_byte` and `perplexity` with their intervals."""
    n = int((scores.tokens > 0).sum())
    over = f"{scores.tokens.sum()} tokens, {scores.sizes.sum()} bytes"
    nats, sizes, tokens = scores.nll, scores.sizes.astype(float), scores.tokens.astype(float)
    bits = _measured("bits_per_byte", interval(nats / math.log(2), sizes, seed=seed), "bits/byte", n)
    perplexity = _measured("perplexity", interval(nats, tokens, transform=np.exp, seed=seed), "per token", n)
    return [replace(bits, note=over), replace(perplexity, note=over)]


def nearness(comparison: Comparison, *, seed: int = 0) -> list[Measure]:
    """`teacher_kl` and `teacher_agreement` with their intervals."""
    tokens = comparison.scores.tokens.astype(float)
    n = int((tokens > 0).sum())
    kl = _measured("teacher_kl", interval(comparison.kl, tokens, seed=seed), "nats/token", n)
    agreed = interval(comparison.agreed, tokens, seed=seed)
    return [kl, _measured("teacher_agreement", agreed, "share", n, better="higher")]


def weight(loaded: Loaded) -> list[Measure]:
    """`parameters` and `bytes`: on disk where the model lies there, else in memory."""
    counted, held = count_parameters(loaded.model), bytes_in_memory(loaded.model)
    apart = f"{counted.embeddings} in embeddings, {counted.blocks} in blocks"
    try:
        size, where = bytes_on_disk(loaded.path), f"on disk; {held / MIB:.0f} MiB in memory"
    except NotFound:
        size, where = held, "in memory"
    note = f"{loaded.note}, {where}" if loaded.note else where
    return [
        Measure("parameters", float(counted.total), "parameters", 1, note=apart),
        Measure("bytes", float(size), "bytes", 1, note=note),
    ]


def pace(speed: Speed) -> list[Measure]:
    """`prefill_tokens_per_second`, `decode_tokens_per_second` and `peak_memory`."""
    timed = {"prefill_tokens_per_second": speed.prefill, "decode_tokens_per_second": speed.decode}
    measures = [_timed(name, runs, speed.conditions) for name, runs in timed.items()]
    return [*measures, Measure("peak_memory", float(speed.peak_memory), "bytes", 1, note=speed.conditions)]


def differences(judged: Judged, baseline: Judged, *, seed: int = 0) -> list[Measure]:
    """`judged` less `baseline` in each measure that both have, by the paired bootstrap over the same documents.

    Named `bits_per_byte_difference` and so on. Empty where both did not score the same text.
    """
    pairs = _pairs(judged, baseline)
    return [_difference(name, *columns, baseline=baseline.name, seed=seed) for name, columns in pairs.items()]


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def _pairs(judged: Judged, baseline: Judged) -> dict[str, Columns]:
    """For each comparable measure the sums of both by document, and what they are divided by."""
    ours, theirs = judged.scores, baseline.scores
    pairs: dict[str, Columns] = {}
    if np.array_equal(ours.sizes, theirs.sizes):
        pairs["bits_per_byte"] = (ours.nll / math.log(2), theirs.nll / math.log(2), ours.sizes)
    if judged.comparison and baseline.comparison and np.array_equal(ours.tokens, theirs.tokens):
        pairs["teacher_kl"] = (judged.comparison.kl, baseline.comparison.kl, ours.tokens)
        pairs["teacher_agreement"] = (judged.comparison.agreed, baseline.comparison.agreed, ours.tokens)
    if judged.answers and baseline.answers and len(judged.answers.rouge_l) == len(baseline.answers.rouge_l):
        points = judged.answers.rouge_l
        pairs["rouge_l"] = (points, baseline.answers.rouge_l, np.ones_like(points))
    return pairs


UNITS = {"bits_per_byte": "bits/byte", "teacher_kl": "nats/token", "teacher_agreement": "share", "rouge_l": "points"}
HIGHER = {"teacher_agreement", "rouge_l"}


def _difference(
    name: str, a: np.ndarray, b: np.ndarray, below: np.ndarray, *, baseline: str, seed: int
) -> Measure:
    found = paired(a, b, below.astype(float), seed=seed)
    n = int((below > 0).sum())
    measured = _measured(f"{name}_difference", Interval(*found[:3]), UNITS[name], n, better=_better(name))
    ahead = 1 - found.probability if name in HIGHER else found.probability
    return replace(measured, note=f"less {baseline}, paired; better in {ahead:.1%} of draws")


def _better(name: str) -> Literal["lower", "higher"]:
    return "higher" if name in HIGHER else "lower"


def _rouge(answers: Answers, *, seed: int) -> Measure:
    found = interval(answers.rouge_l, np.ones_like(answers.rouge_l), seed=seed)
    return _measured("rouge_l", found, "points", len(answers.texts), better="higher")


def _measured(name: str, found: Interval, unit: str, n: int, *, better: str = "lower") -> Measure:
    low, high = (None if math.isnan(bound) else bound for bound in (found.low, found.high))
    return Measure(name, found.value, unit, n, better=better, low=low, high=high)


def _timed(name: str, runs: np.ndarray, conditions: str) -> Measure:
    spread = {"low": float(runs.min()), "high": float(runs.max())} if len(runs) > 1 else {}
    return Measure(name, float(np.median(runs)), "tokens/s", len(runs), better="higher", note=conditions, **spread)


def _beside(teacher: Teacher, loaded: Loaded) -> Comparison:
    if teacher.loaded is loaded:  # the teacher beside itself: zero and one by definition, so it need not read again
        scores = teacher.remembered.scores
        return Comparison(scores, np.zeros(len(scores.nll)), scores.tokens.astype(float))
    return compare(teacher.remembered, loaded.model, vocabulary=shared_ids(teacher.loaded.tokenizer, loaded.tokenizer))
