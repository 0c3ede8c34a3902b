"""A teacher that is not here: known by its cache, or asked over the wire. Its weights are never read."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from potstill.core.artefact import Parent
from potstill.core.errors import UsageError
from potstill.core.types import OWN, Measure, Needs, supervised
from potstill.data.cache import Cache, Manifest
from potstill.data.served import TOP_K, Served
from potstill.data.wire import Address, is_address
from potstill.evaluate.measure import quality
from potstill.evaluate.perplexity import Scores, scored_tokens, sizes_of, tally
from potstill.evaluate.reading import Reading, Row, packs
from potstill.objectives.named import Mixture
from potstill.pipeline.capture import tokenizer_facts

UNMEASURED = "its weights were not here, so KL and agreement with it, its size and its samples are not measured"


@dataclass(frozen=True)
class Absent:
    """What stands for the teacher's weights: its `companion`, which says what it says; `proof` that ids are shared."""

    companion: Cache | Served
    vocabulary: int
    parent: Parent
    proof: str

    @classmethod
    def of(
        cls, name: str | None, cache: Cache | None, tokenizer: PreTrainedTokenizerBase, *, top_k: int = TOP_K
    ) -> "Absent":
        """The teacher of a cache, or else the one that is served at the address `name`, for a student's `tokenizer`.

        Raises: CacheMismatch where the cache was made with another tokenizer; what `Served` raises.
        """
        if cache is not None:
            facts = cache.manifest.facts
            cache.require(tokenizer_facts(tokenizer))
            parent = Parent(role="teacher", name=cache.manifest.names["teacher"], digest=facts.teacher, note=UNMEASURED)
            return cls(cache, facts.vocabulary, parent, "yes, the cache was made with this tokenizer (SHA-256)")
        assert name is not None
        served = Served(name, tokenizer, top_k=top_k)
        parent = Parent(role="teacher", name=f"{served.url}#{served.name}", digest=None, note=UNMEASURED)
        return cls(
            served, served.vocabulary, parent, f"yes, the server reads known texts alike ({served.dialect.name})"
        )

    def ahead(self, data: object, *, route: int | None = None) -> object:
        """Packs to train on, of which a server is asked about each (or the documents of a route) as it is read."""
        return self.companion.ahead(data, route=route) if isinstance(self.companion, Served) else data

    def measures(self, rows: Sequence[Row], reading: Reading) -> list[Measure]:
        """What a server's own log-probabilities of held-out text come to; a cache holds none of that text."""
        if not isinstance(self.companion, Served):
            return []
        nll = np.zeros(len(rows))
        for batch, owners in packs(rows, reading):
            positions, _, segment = supervised(batch)
            with torch.no_grad():
                own = self.companion.signals(batch, Needs(positions)).scores[OWN]
            nll += tally(owners[segment], -own, len(rows))
        return quality(Scores(nll, scored_tokens(rows), sizes_of(rows)))

    def close(self) -> None:
        """End the connections to a server."""
        if isinstance(self.companion, Served):
            self.companion.close()


@contextlib.contextmanager
def leaving(teachers: Iterable[object]) -> Iterator[None]:
    """Leaves no connection to a teacher open that is not here."""
    try:
        yield
    finally:
        for teacher in teachers:
            if isinstance(teacher, Absent):
                teacher.close()


def require_teacher(teacher: str | None, cache: str | None, *, student: str | None) -> None:
    """Refuse to learn from nothing, from two teachers, or to cut weights that are not here.

    Raises: UsageError.
    """
    if teacher is None and cache is None:
        raise UsageError("a teacher is needed; give --teacher, such as smollm2")
    served = is_address(teacher)
    if served:
        Address.parse(str(teacher))
    if served and cache is not None:
        raise UsageError("--teacher is a server and --teacher-cache a folder; learn from one of them")
    if (served or teacher is None) and student is None:
        raise UsageError(
            "--keep and --params cut the teacher's own weights, which are not here; give --student, such as what "
            "`potstill prune` made where they are"
        )


def require_bounded(objective: Mixture, *, top_k: int) -> None:
    """Refuse an objective that a served teacher's likeliest tokens can neither give nor bound.

    Raises: UsageError.
    """
    if not objective.teaches:
        raise UsageError("cross_entropy asks no teacher, so a served one has no use; give one whose weights are here")
    if objective.temperature != 1:
        raise UsageError(
            f"--temperature is {objective.temperature:g}, and a server tells the mass of what it leaves out at "
            f"1 alone; leave it at 1, or learn from a cache or a teacher that is here"
        )
    if objective.name == "adaptive_kl":
        raise UsageError("adaptive_kl weighs single tokens of the tail, which a server does not name; learn live")
    if top_k < 1:
        raise UsageError(f"--top-k is {top_k}; at least one token of each distribution is needed")


def require_kept(objective: Mixture, manifest: Manifest) -> None:
    """Refuse an objective that what a cache keeps can neither give nor bound.

    Of an f-divergence the likeliest tokens and the mass of the rest give a lower bound that the teacher minimises;
    drawn tokens give an unbiased gradient of the forward KL alone.

    Raises: UsageError.
    """
    if not objective.teaches:
        raise UsageError("cross_entropy asks no teacher, so --teacher-cache has no use; omit it")
    if objective.recalled:
        if not manifest.hidden:
            raise UsageError(
                f"{objective.name} learns from hidden states, and this cache keeps none; capture it with --hidden, or "
                f"choose a divergence"
            )
        return
    kept_all = manifest.kept == "top-k" and manifest.top_k >= manifest.facts.vocabulary and manifest.mass == 1
    whole = manifest.exact and kept_all
    if manifest.kept == "sampled" and objective.name != "forward_kl":
        raise UsageError(f"a cache of drawn tokens serves forward_kl alone, not {objective.name}; capture --top-k")
    if objective.name == "adaptive_kl" and not whole:
        raise UsageError("adaptive_kl weighs single tokens of the tail, which a cache does not keep; learn live")
