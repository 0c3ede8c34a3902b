"""Predicts the speed-up of speculative decoding from acceptance by position and from measured times.

    speed-up = (1 + sum_i prod_{j <= i} a_j) / ((draft seconds + verification seconds) / plain seconds)

The numerator is the number of tokens per pass. Seconds are means over the passes; a plain pass reads one token. A
drafter without a draft for a token costs a plain pass there.

Source: Leviathan et al. (arXiv:2211.17192), theorem 3.8, with acceptance by position and with measured costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from potstill.core.errors import DataError
from potstill.core.screen import status
from potstill.decode.draft_length import interpolate
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.evaluate.speculation.candidates import Candidate, Setting
from potstill.evaluate.speculation.recording import (
    CycleLength,
    DraftPass,
    RecordedSpeculation,
    RecordedText,
    WrongDrafter,
    compute_medians,
    record_text,
)
from potstill.evaluate.speculation.replay import fill_unknown, read_tokens, replay
from potstill.ops.acceptance import compute_mean_tokens_by_position


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a setting should reach.

    `acceptance` holds, for each position in a draft, the share of passes that keep it among those that keep all before.
    Costs are means over passes, and a plain pass is 1.
    """

    acceptance: Sequence[float]
    draft_cost: float
    verify_cost: float

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per pass of the target."""
        return compute_mean_tokens_by_position(self.acceptance)

    @property
    def speed_up(self) -> float:
        """Tokens per second, relative to plain decoding."""
        return self.tokens_per_pass / (self.draft_cost + self.verify_cost)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The records of a candidate on all prompts, and the times that predictions need.

    `draft_seconds` is by the levels that a draft may have, and `verify_seconds` by its number of tokens.
    """

    candidate: Candidate
    texts: Sequence[RecordedText]
    draft_seconds: Mapping[int, float]
    verify_seconds: Mapping[int, float]
    plain_seconds: float

    def predict(self, setting: Setting, *, max_new_tokens: int) -> Prediction:
        """The prediction for one of the settings of the candidate."""
        if setting.length is None:
            passes = [each for text in self.texts for each in text.passes]
        else:
            records = fill_unknown([read_tokens(text) for text in self.texts])
            passes = [
                each for record in records for each in replay(record, setting.length, max_new_tokens=max_new_tokens)
            ]
        return Prediction(
            acceptance=compute_acceptance(passes),
            draft_cost=fmean(interpolate(self.draft_seconds, [p.limit for p in passes])) / self.plain_seconds,
            verify_cost=fmean(interpolate(self.verify_seconds, [p.size for p in passes])) / self.plain_seconds,
        )


def compute_acceptance(passes: Sequence[DraftPass]) -> list[float]:
    """For each position in a draft, the share of passes that keep it among those that keep all before it."""
    survivors = [sum(each.accepted >= n for each in passes) for n in range(max(each.limit for each in passes) + 1)]
    return [accepted / before if before else 0.0 for before, accepted in pairwise(survivors)]


def collect_evidence(
    runner: ModelRunner, requests: Sequence[DecodeRequest], candidates: Sequence[Candidate]
) -> list[Evidence]:
    """Writes every text with each candidate once, in turn, so that a machine that slows down slows all of them.

    Wrong drafts of every length take a turn too. They time a plain pass and the verification of chains; that of trees
    comes from the tree's own passes.

    Raises: DataError if no text has a second token.
    """
    longest = max((max(candidate.lengths, default=1) for candidate in candidates), default=1)
    wrong = RecordedSpeculation(
        drafter=WrongDrafter(runner.vocabulary), length=CycleLength(range(longest + 1)), nodes=longest
    )
    speculations = [wrong, *(candidate.make_recorded() for candidate in candidates)]
    texts: list[list[RecordedText]] = [[] for _ in speculations]
    with status("measuring acceptance and costs", total=len(requests) * len(speculations)) as advance:
        for request in requests:
            for speculation, records in zip(speculations, texts, strict=True):
                records.append(record_text(runner, request, speculation))
                advance()
    chain_seconds = time_verification(texts[0])
    if not chain_seconds:
        raise DataError("every answer ends with its first token, so no draft can help; give other prompts")
    return [
        make_evidence(candidate, records, chain_seconds)
        for candidate, records in zip(candidates, texts[1:], strict=True)
    ]


def make_evidence(candidate: Candidate, texts: Sequence[RecordedText], chain_seconds: Mapping[int, float]) -> Evidence:
    """The evidence of a candidate; `chain_seconds` is the time of a pass by its number of draft tokens."""
    passes = [each for text in texts for each in text.passes]
    return Evidence(
        candidate=candidate,
        texts=texts,
        draft_seconds=compute_medians(passes, lambda each: each.limit, lambda each: each.draft_seconds),
        verify_seconds=chain_seconds if candidate.tree is None else time_verification(texts),
        plain_seconds=chain_seconds[0],
    )


def time_verification(texts: Sequence[RecordedText]) -> dict[int, float]:
    """The median seconds of a pass by its number of draft tokens."""
    passes = [each for text in texts for each in text.passes]
    return compute_medians(passes, lambda each: each.size, lambda each: each.verify_seconds)
