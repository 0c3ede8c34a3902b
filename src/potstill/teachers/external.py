"""A teacher without loaded weights: a cache or a server."""

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
    """A cache or server instead of a loaded teacher. `proof` describes the check that its token ids are the
    student's."""

    signal_source: TeacherCache | ServedTeacher
    vocabulary: int
    parent: Parent
    proof: str

    @classmethod
    def from_cache_or_server(
        cls, name: str | None, cache: TeacherCache | None, tokenizer: PreTrainedTokenizerBase, *, top_k: int = TOP_K
    ) -> "ExternalTeacher":
        """The teacher in `cache`, or else the one served at the address `name`, for a student with `tokenizer`.

        Raises: CacheMismatch if the cache was made with another tokenizer; what `ServedTeacher` raises.
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
            served,
            served.vocabulary,
            parent,
            f"yes, the server tokenizes known texts alike ({served.logprob_format.name})",
        )

    def prefetch(self, data: object, *, route: int | None = None) -> object:
        """`data`, a data set of packs, with requests to a server sent as each pack is read; see `ServedTeacher`."""
        return (
            self.signal_source.prefetch_packs(data, route=route)
            if isinstance(self.signal_source, ServedTeacher)
            else data
        )

    def close(self) -> None:
        """Closes the connections to a server."""
        if isinstance(self.signal_source, ServedTeacher):
            self.signal_source.close()


@contextlib.contextmanager
def closing_connections(teachers: Iterable[object]) -> Iterator[None]:
    """Closes the connections to all external teachers at the end of the block."""
    try:
        yield
    finally:
        for teacher in teachers:
            if isinstance(teacher, ExternalTeacher):
                teacher.close()


def check_teacher_source(teacher: str | None, cache: str | None, *, student: str | None) -> None:
    """Refuses a run without a teacher, with both a server and a cache, or with pruning of weights that are not loaded.

    Raises: UsageError.
    """
    if teacher is None and cache is None:
        raise UsageError("no teacher is given; give --teacher, such as smollm2")
    is_served = is_address(teacher)
    if is_served:
        Address.from_string(str(teacher))
    if is_served and cache is not None:
        raise UsageError("--teacher is a server and --teacher-cache a folder; give one of them")
    if (is_served or teacher is None) and student is None:
        raise UsageError(
            "--keep and --params prune the teacher's weights, which are not loaded here; give --student, such as the "
            "output of `potstill prune`"
        )


def check_server_supports(objective: ObjectiveConfig, *, top_k: int) -> None:
    """Refuses an objective if the likeliest tokens of a served teacher give neither its value nor a bound.

    Raises: UsageError.
    """
    if not objective.uses_teacher:
        raise UsageError("cross_entropy uses no teacher; remove the served --teacher, or choose another objective")
    if objective.temperature != 1:
        raise UsageError(
            f"--temperature is {objective.temperature:g}, and a server gives the mass of all other tokens only at 1; "
            f"use 1, or a cache or a loaded teacher"
        )
    if not objective.supports_partial_distributions:
        raise UsageError(
            f"{objective.name} needs the probability of every token, which a server does not give; use a loaded "
            "teacher, or a divergence such as forward_kl"
        )
    if top_k < 1:
        raise UsageError(f"--top-k is {top_k}; at least one token of each distribution is needed")


def check_cache_supports(objective: ObjectiveConfig, manifest: Manifest) -> None:
    """Refuses an objective if the content of a cache gives neither its value nor a bound.

    For an f-divergence, the likeliest tokens and the mass of the rest give a lower bound that the teacher minimizes.
    Sampled tokens give an unbiased gradient of the forward KL only.

    Raises: UsageError.
    """
    if not objective.uses_teacher:
        raise UsageError("cross_entropy uses no teacher; remove --teacher-cache")
    if objective.needs_only_last_hidden:
        if not manifest.hidden:
            raise UsageError(
                f"{objective.name} learns from hidden states, and this cache stores none; make it with --hidden, or "
                f"choose a divergence"
            )
        return
    covers_vocabulary = manifest.kept == "top-k" and manifest.top_k >= manifest.facts.vocabulary and manifest.mass == 1
    is_exact = manifest.exact and covers_vocabulary
    if manifest.kept == "sampled" and not objective.supports_sampled_tokens:
        raise UsageError(
            f"a cache of sampled tokens supports forward_kl only, not {objective.name}; make one of --top-k"
        )
    if not objective.supports_partial_distributions and not is_exact:
        raise UsageError(
            f"{objective.name} needs the probability of every token, which a cache does not have; use a loaded "
            "teacher, or a divergence such as forward_kl"
        )
