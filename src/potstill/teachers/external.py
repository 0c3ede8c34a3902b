"""A teacher that is not here: known by its cache, or asked over the wire. Its weights are never read."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from potstill.core.card import Parent
from potstill.core.errors import UsageError
from potstill.models.fingerprint import fingerprint_tokenizer
from potstill.objectives.config import ObjectiveConfig
from potstill.teachers.cached import Manifest, TeacherCache
from potstill.teachers.http_client import Address, is_address
from potstill.teachers.served import TOP_K, ServedTeacher

UNMEASURED_NOTE = "its weights were not here, so KL and agreement with it, its size and its samples are not measured"


@dataclass(frozen=True)
class ExternalTeacher:
    """What stands for the teacher's weights: its `companion`, which says what it says; `proof` that ids are shared."""

    signal_source: TeacherCache | ServedTeacher
    vocabulary: int
    parent: Parent
    proof: str

    @classmethod
    def from_cache_or_server(
        cls, name: str | None, cache: TeacherCache | None, tokenizer: PreTrainedTokenizerBase, *, top_k: int = TOP_K
    ) -> "ExternalTeacher":
        """The teacher of a cache, or else the one that is served at the address `name`, for a student's `tokenizer`.

        Raises: CacheMismatch where the cache was made with another tokenizer; what `Served` raises.
        """
        if cache is not None:
            facts = cache.manifest.facts
            cache.check_facts(fingerprint_tokenizer(tokenizer))
            parent = Parent(
                role="teacher", name=cache.manifest.names["teacher"], digest=facts.teacher, note=UNMEASURED_NOTE
            )
            return cls(cache, facts.vocabulary, parent, "yes, the cache was made with this tokenizer (SHA-256)")
        assert name is not None
        served = ServedTeacher(name, tokenizer, top_k=top_k)
        parent = Parent(role="teacher", name=f"{served.url}#{served.name}", digest=None, note=UNMEASURED_NOTE)
        return cls(
            served, served.vocabulary, parent, f"yes, the server reads known texts alike ({served.logprob_format.name})"
        )

    def prefetch(self, data: object, *, route: int | None = None) -> object:
        """Packs to train on, of which a server is asked about each (or the documents of a route) as it is read."""
        return (
            self.signal_source.prefetch_packs(data, route=route)
            if isinstance(self.signal_source, ServedTeacher)
            else data
        )

    def close(self) -> None:
        """End the connections to a server."""
        if isinstance(self.signal_source, ServedTeacher):
            self.signal_source.close()


@contextlib.contextmanager
def closing_connections(teachers: Iterable[object]) -> Iterator[None]:
    """Leaves no connection to a teacher open that is not here."""
    try:
        yield
    finally:
        for teacher in teachers:
            if isinstance(teacher, ExternalTeacher):
                teacher.close()


def check_teacher_source(teacher: str | None, cache: str | None, *, student: str | None) -> None:
    """Refuse to learn from nothing, from two teachers, or to cut weights that are not here.

    Raises: UsageError.
    """
    if teacher is None and cache is None:
        raise UsageError("a teacher is needed; give --teacher, such as smollm2")
    is_served = is_address(teacher)
    if is_served:
        Address.from_string(str(teacher))
    if is_served and cache is not None:
        raise UsageError("--teacher is a server and --teacher-cache a folder; learn from one of them")
    if (is_served or teacher is None) and student is None:
        raise UsageError(
            "--keep and --params cut the teacher's own weights, which are not here; give --student, such as what "
            "`potstill prune` made where they are"
        )


def check_server_supports(objective: ObjectiveConfig, *, top_k: int) -> None:
    """Refuse an objective that a served teacher's likeliest tokens can neither give nor bound.

    Raises: UsageError.
    """
    if not objective.uses_teacher:
        raise UsageError("cross_entropy asks no teacher, so a served one has no use; give one whose weights are here")
    if objective.temperature != 1:
        raise UsageError(
            f"--temperature is {objective.temperature:g}, and a server tells the mass of what it leaves out at "
            f"1 alone; leave it at 1, or learn from a cache or a teacher that is here"
        )
    if not objective.supports_partial_distributions:
        raise UsageError(
            f"{objective.name} needs the probability of every token, which a server does not give; use a teacher that "
            "is here, or a divergence such as forward_kl"
        )
    if top_k < 1:
        raise UsageError(f"--top-k is {top_k}; at least one token of each distribution is needed")


def check_cache_supports(objective: ObjectiveConfig, manifest: Manifest) -> None:
    """Refuse an objective that what a cache keeps can neither give nor bound.

    Of an f-divergence the likeliest tokens and the mass of the rest give a lower bound that the teacher minimises;
    drawn tokens give an unbiased gradient of the forward KL alone.

    Raises: UsageError.
    """
    if not objective.uses_teacher:
        raise UsageError("cross_entropy asks no teacher, so --teacher-cache has no use; omit it")
    if objective.needs_only_last_hidden:
        if not manifest.hidden:
            raise UsageError(
                f"{objective.name} learns from hidden states, and this cache keeps none; capture it with --hidden, or "
                f"choose a divergence"
            )
        return
    covers_vocabulary = manifest.kept == "top-k" and manifest.top_k >= manifest.facts.vocabulary and manifest.mass == 1
    is_exact = manifest.exact and covers_vocabulary
    if manifest.kept == "sampled" and not objective.supports_sampled_tokens:
        raise UsageError(f"a cache of drawn tokens serves forward_kl alone, not {objective.name}; capture --top-k")
    if not objective.supports_partial_distributions and not is_exact:
        raise UsageError(
            f"{objective.name} needs the probability of every token, which a cache does not hold; use a teacher that "
            "is here, or a divergence such as forward_kl"
        )
