"""Is the loss right for this teacher, this student and this text? The invariants, on the user's own pair."""

import copy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from potstill.core import backend
from potstill.core.errors import DataError, PotstillError, UsageError, VocabularyMismatch
from potstill.data.cache import Cache
from potstill.data.chat import tokenise
from potstill.data.corpus import load_corpus
from potstill.data.pack import Packs, pack
from potstill.evaluate.perplexity import bos_of
from potstill.models.load import Loaded, load
from potstill.models.vocabulary import real_ids, shared_ids
from potstill.objectives.named import Mixture
from potstill.pipeline.crossing import examine_across
from potstill.pipeline.examination import FAIL, Check, examine
from potstill.pipeline.invariants import ALL, other_tokens
from potstill.pipeline.pair import Pair
from potstill.pipeline.stage import as_value
from potstill.pipeline.texts import columns_of
from potstill.pipeline.worlds import crossing_of, world_of
from potstill.train.study import Study

READ = 50_000  # tokens of the text that packs are drawn from
ACROSS = "dskdv2_eta"  # the objective that is advised for a pair with two tokenizers


class Unsound(PotstillError):
    """An invariant does not hold, so that training would be wrong in silence."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Examines `teacher` and `student` (by default the teacher itself) on `data`, within a minute for small models.

    A pair with two tokenizers is examined under `objective`, which has to compare across; one with the same tokenizer
    under its divergence and temperature, or under the divergence inside a method.
    """

    kind: ClassVar[str] = "doctor"
    teacher: str
    student: str | None = None
    data: str = "stdlib"
    columns: str = ""
    teacher_cache: str | None = None
    objective: Mixture = field(default_factory=Mixture)
    context: int = 512
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return as_value(self)

    def run(self) -> list[Check]:
        """Every check that applies.

        Raises: NotFound, UsageError, UnsafeModel and the like, as training would.
        """
        device = backend.device(self.device)
        teacher = self._load(self.teacher)
        twin = replace(teacher, model=copy.deepcopy(teacher.model)) if self.student is None else None
        student = twin or self._load(str(self.student))
        try:
            pair = self._pair(student, teacher)
        except VocabularyMismatch as error:
            return [other_tokens(error, command=self.command)]
        cache = None if self.teacher_cache is None else Cache(Path(self.teacher_cache).expanduser())
        spoken = "auto" if cache is None else cache.manifest.facts.dtype
        compute = backend.dtype(self.dtype, on=str(device), auto=spoken)
        corpus = load_corpus(self.data, columns=columns_of(self.columns))
        try:
            packs = self._packs(corpus, student.tokenizer, cache)
        except DataError as error:
            why = "prompts are given when it is asked, and answers are what is learnt"
            return [Check.of("text to train on", False, found=str(error), why=why, remedy="")]
        student.model.to(device)
        teacher.model.to(device=device, dtype=compute)
        if pair.across:
            pair = pair._replace(chats=corpus.kind != "text")
            crossing = crossing_of(pair, packs, self._study(pair, teacher, compute), kind=corpus.kind)
            return list(examine_across(crossing))
        world = world_of(
            packs,
            student=student.model,
            student_tokenizer=student.tokenizer,
            teacher=teacher.model,
            teacher_tokenizer=teacher.tokenizer,
            vocabulary=pair.vocabulary,
            kind=corpus.kind,
            compute=compute,
            cache=cache,
            compared=self.objective.compared,
        )
        return list(examine(world, ALL))

    def _pair(self, student: Loaded, teacher: Loaded) -> Pair:
        """Both, and whether they have two tokenizers.

        Raises: VocabularyMismatch where they have, and the objective compares token by token.
        """
        warped = self.objective.warped
        try:
            return Pair(student.model, student, teacher, shared_ids(teacher.tokenizer, student.tokenizer), [], {})
        except VocabularyMismatch:
            if not (self.objective.across and self.objective.teaches):
                raise
        if self.teacher_cache is not None:
            raise UsageError("a cache holds one tokenizer's ids, and this pair has two; leave --teacher-cache out")
        return Pair(student.model, student, teacher, real_ids(student.tokenizer), [], {}, across=True, warped=warped)

    @property
    def command(self) -> str:
        """The call that examines this pair whatever its tokenizers."""
        models = ["--teacher", self.teacher, "--student", str(self.student)]
        return shlex.join(["potstill", "doctor", *models, "--data", self.data, "--objective", ACROSS])

    def _study(self, pair: Pair, teacher: Loaded, compute: torch.dtype) -> Study:
        """What `distill` would train."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            objective = self.objective.build(pair.sides)
        if isinstance(objective, nn.Module):
            objective.to(pair.student.device)
        frozen = {"teacher": teacher.model}
        return Study(pair.student, objective, frozen=frozen, vocabulary=pair.vocabularies, compute_dtype=compute)

    def _load(self, name: str) -> Loaded:
        return load(name, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)

    def _packs(self, corpus: Any, tokenizer: PreTrainedTokenizerBase, cache: Cache | None) -> Packs:
        read = tokenise(corpus, tokenizer, limit=READ)
        held = None if cache is None else cache.holds
        return pack(read, length=self.context, seed=self.seed, bos=bos_of(tokenizer), only=held)


def require_sound(checks: Sequence[Check]) -> list[dict[str, str]]:
    """The checks as a card keeps them.

    Raises: Unsound with the first that failed.
    """
    for check in checks:
        if check.outcome == FAIL:
            raise Unsound(f"{check.name}: {check.found}; {check.remedy or check.why} (or give --skip-doctor)")
    return [{"name": check.name, "outcome": f"{check.outcome}: {check.found}"} for check in checks]
