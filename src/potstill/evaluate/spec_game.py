"""The game of speculative decoding: how large a draft should be, and how long its drafts.

    theory     S(g) = (1 - alpha^(g+1)) / ((1 - alpha) (g c + 1))
    practice   the speed-up that was measured, or predicted from acceptance by position and all measured times

A larger draft model has a higher acceptance alpha and a higher cost c. A longer draft keeps a smaller share of its
tokens. So in theory both have a turning point, behind which the speed-up falls.

Source: Liu, Zhang and Song, "How Speculative Can Speculative Decoding Be?" (https://aclanthology.org/2024.lrec-main.725),
which compares drafts of several sizes and lengths g of 1 to 7 by their latency. S(g) is from Leviathan et al.
(arXiv:2211.17192), theorem 3.8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.core.counts import count_noun
from potstill.ops.acceptance import (
    best_draft_length,
    compute_operation_factor,
    find_equal_rate,
    speed_up,
)

LONGEST = 16  # of the lengths that the theory tries


@dataclass(frozen=True, kw_only=True)
class GameDraft:
    """A draft: its parameters as a share of the target's (None without a model), alpha, c, and its speed-ups by length.

    `speed_ups` holds the practice.
    """

    name: str
    share: float | None
    alpha: float
    cost: float
    speed_ups: Mapping[int, float]

    @property
    def theory_length(self) -> int:
        """The length of the largest S; 0 where no draft pays, which is alpha <= c."""
        return best_draft_length(self.alpha, self.cost, longest=LONGEST)

    @property
    def best_length(self) -> int:
        """The length of the largest speed-up in practice."""
        return max(self.speed_ups, key=lambda length: self.speed_ups[length])

    @property
    def best_speed_up(self) -> float:
        """The largest speed-up in practice."""
        return self.speed_ups[self.best_length]

    def to_dict(self) -> dict[str, Any]:
        """The draft as plain data, with theory and practice by length."""
        lengths, share = list(self.speed_ups), self.share
        return {
            "draft": self.name,
            "parameter_share": share,
            "alpha": self.alpha,
            "cost": self.cost,
            "theory": {
                "best_length": self.theory_length,
                "best_speed_up": speed_up(self.alpha, self.theory_length, self.cost),
                "by_length": {length: speed_up(self.alpha, length, self.cost) for length in lengths},
            },
            "practice": {
                "best_length": self.best_length,
                "best_speed_up": self.best_speed_up,
                "by_length": dict(self.speed_ups),
            },
            "operations": None if share is None else compute_operation_factor(self.alpha, self.best_length, share),
        }


@dataclass(frozen=True)
class Game:
    """All drafts of one target, with the best of them."""

    drafts: Sequence[GameDraft]

    @property
    def best(self) -> GameDraft:
        """The draft with the largest speed-up in practice."""
        return max(self.drafts, key=lambda draft: draft.best_speed_up)

    @property
    def has_length_turn(self) -> bool:
        """Whether the speed-up of the best draft falls behind a length that was tried."""
        return self.best.best_length < max(self.best.speed_ups)

    @property
    def has_size_turn(self) -> bool:
        """Whether a smaller and a larger draft model than the best were tried, which are slower."""
        shares = [draft.share for draft in self.drafts if draft.share is not None]
        return self.best.share is not None and min(shares) < self.best.share < max(shares)

    def describe(self) -> str:
        """The outcome in two sentences."""
        best = self.best
        size = "" if best.share is None else f", which has {best.share:.0%} of the target's parameters"
        turns = [
            f"{'a' if has_turn else 'no'} turning point in {name}"
            for name, has_turn in (("length", self.has_length_turn), ("size", self.has_size_turn))
        ]
        return (
            f"The best draft is {best.name}{size}, with {count_noun(best.best_length, 'token')} per draft: "
            f"{best.best_speed_up:.2f} times the speed of plain decoding. What was tried has {' and '.join(turns)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The game as plain data."""
        return {
            "drafts": [draft.to_dict() for draft in self.drafts],
            "best": {
                "draft": self.best.name,
                "draft_length": self.best.best_length,
                "speed_up": self.best.best_speed_up,
            },
            "turning_point_in_length": self.has_length_turn,
            "turning_point_in_size": self.has_size_turn,
            "summary": self.describe(),
        }


def read_game(advice: Mapping[str, Any]) -> Game:
    """The game from the result of `potstill advise` on chains of several drafts."""
    return Game([_read_draft(entry, advice["settings"]) for entry in advice["drafts"]])


def _read_draft(entry: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]) -> GameDraft:
    rows = [row for row in settings if row["draft"] == entry["draft"] and row["tree"] is None]
    longest = max(int(length) for length in entry["cost"])
    return GameDraft(
        name=entry["draft"],
        share=entry["parameter_share"],
        alpha=find_equal_rate(entry["acceptance"]),
        cost=entry["cost"][str(longest)] / longest,
        speed_ups={
            row["draft_length"]: row["predicted"] if row["measured"] is None else row["measured"] for row in rows
        },
    )
