"""Measuring models side by side: one text, one teacher read once, every model on the same documents."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from potstill.core import backend
from potstill.core.artefact import write_text
from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.data.corpus import Corpus, load_corpus
from potstill.evaluate.agreement import Remembered, compare, remember
from potstill.evaluate.harness import run_tasks
from potstill.evaluate.measure import Judged, Seen, differences, quality, rouge, sizes, speeds
from potstill.evaluate.perplexity import score
from potstill.evaluate.reading import Reading, Row, require_context
from potstill.evaluate.rouge import judge_answers, questions
from potstill.models.load import Loaded, load
from potstill.models.vocabulary import real_ids, shared_ids
from potstill.pipeline.stage import as_value, note
from potstill.pipeline.texts import columns_of, rows_of


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """`models` on the documents of one `split` of `data`, beside `teacher` if there is one.

    Bits per byte and perplexity; for models of the teacher's vocabulary KL to it and agreement with it; ROUGE-L where
    the data holds prompts with responses, or chats; parameters, bytes, and tokens/s unless `speed` is off.
    """

    kind: ClassVar[str] = "measurement"
    models: tuple[str, ...]
    data: str = "stdlib"
    columns: str = ""
    split: str = "validation"
    teacher: str | None = None
    documents: int = 100
    context: int = 512
    prompts: int = 20
    speed: bool = True
    tasks: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
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
        corpus = load_corpus(self.data, split=self.split, columns=columns_of(self.columns))
        found = self.judge(corpus)
        result = {
            "models": {name: [m.to_dict() for m in one.measures] for name, one in found.items()},
            "paired": differences({name: one.seen for name, one in found.items()}),
            "data": {"name": corpus.name, "digest": corpus.digest, "documents": self.documents, **corpus.provenance},
            "stage": self.to_dict(),
        }
        if out is not None:
            write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return result

    def judge(self, corpus: Corpus) -> dict[str, Judged]:
        """Every model on the documents of `corpus`, by name; `data` and `split` are not looked at."""
        teacher = None if self.teacher is None else self._load(self.teacher)
        remembered: dict[int, Remembered] = {}
        found: dict[str, Judged] = {}
        for number, name in enumerate(self.models, 1):
            note(f"measuring model {number} of {len(self.models)}: {name}")
            loaded = teacher if teacher is not None and name == self.teacher else self._load(name)
            require_context(self.context, loaded.model)
            vocabulary = None if teacher is None else shared_with(teacher, loaded)
            seen: Seen
            if teacher is None or vocabulary is None:
                reading = self.reading(real_ids(loaded.tokenizer))
                seen = score(loaded.model, self._rows(corpus, loaded), reading)
            else:
                if vocabulary not in remembered:
                    rows = self._rows(corpus, teacher)
                    remembered[vocabulary] = remember(teacher.model, rows, self.reading(vocabulary))
                seen = compare(remembered[vocabulary], loaded.model)
            found[name] = self._judged(seen, loaded, corpus)
        return found

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

    def _judged(self, seen: Seen, loaded: Loaded, corpus: Corpus) -> Judged:
        measures, answers = quality(seen), None
        if corpus.kind != "text" and self.prompts:
            asked = questions(corpus, loaded.tokenizer, limit=self.prompts)
            answers = judge_answers(loaded.model, loaded.tokenizer, asked)
            measures.append(rouge(answers))
        measures += sizes(loaded)
        if self.speed:
            measures += speeds(loaded)
        if self.tasks:
            measures += run_tasks(loaded.model, loaded.tokenizer, self.tasks)
        return Judged(measures, seen, answers)


def shared_with(teacher: Loaded, loaded: Loaded) -> int | None:
    """How many ids both read text as; None where their tokenizers differ, and KL between them means nothing."""
    try:
        return shared_ids(teacher.tokenizer, loaded.tokenizer)
    except VocabularyMismatch:
        return None
