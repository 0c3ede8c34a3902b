"""Records every pass of speculative decoding: how much was drafted and accepted, and how long both sides took.

The drafter runs in the real loop on real texts, so that the times hold all that a pass costs.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from potstill.decode.active_text import ActiveText
from potstill.decode.draft_length import FixedLength
from potstill.decode.drafters.drafter import Draft, DraftContext, Drafter
from potstill.decode.engine import Engine
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.speculative import Speculation, count_levels
from potstill.ops.acceptance import Acceptance

LONG_DRAFTS = 3  # drafts of the longest length for each shorter one


class DraftPass(NamedTuple):
    """One pass of the target, behind `position` new tokens of a text.

    The drafter could draft `limit` levels. Its draft has `depth` levels and `size` tokens, of which the target took
    `accepted` in a row. Times are in seconds.
    """

    position: int
    limit: int
    depth: int
    size: int
    accepted: int
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@dataclass
class CycleLength(FixedLength):
    """Drafts of several lengths in turn. `longest` is the largest of `lengths`."""

    longest: int = field(init=False)
    lengths: Sequence[int]
    current: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        self.longest = max(self.lengths)

    def choose(self) -> int:
        """The next length."""
        self.current = self.lengths[self.count % len(self.lengths)]
        self.count += 1
        return self.current


def schedule_lengths(lengths: Sequence[int]) -> list[int]:
    """Mostly the longest length, whose drafts tell most about the text, and in between each shorter one for its time.

    `lengths` are ascending.
    """
    *shorter, longest = lengths
    return [length for short in shorter for length in (*[longest] * LONG_DRAFTS, short)] or [longest]


@dataclass(kw_only=True)
class RecordedSpeculation(Speculation):
    """A speculation on one text at a time that keeps what each pass did in `passes`."""

    length: CycleLength
    passes: list[DraftPass] = field(default_factory=list)
    position: int = 0
    limit: int = 0

    def propose(self, texts: Sequence[ActiveText]) -> list[Draft]:
        """The drafts of the text, as without a record."""
        (text,) = texts
        drafts = super().propose(texts)
        self.position, self.limit = text.num_new_tokens, max(0, min(self.length.current, text.num_tokens_left - 1))
        return drafts

    def record(self, drafts: Sequence[Draft], acceptances: Sequence[Acceptance], *, verify_seconds: float) -> None:
        """Keeps a pass that verified the draft."""
        (draft,), (acceptance,) = drafts, acceptances
        self.passes.append(
            DraftPass(
                self.position,
                self.limit,
                count_levels(draft),
                len(draft.tokens),
                len(acceptance.path),
                self.draft_seconds,
                verify_seconds,
            )
        )


class WrongDrafter(Drafter):
    """Drafts tokens that the target hardly ever keeps, which times the verification of any number of tokens."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def propose(self, context: DraftContext) -> Draft:
        """A chain of as many tokens as are asked for, which differ from pass to pass."""
        start = 7 * context.ids[-1] + len(context.ids)
        return Draft.chain([(start + 131 * (n + 1)) % self.vocabulary for n in range(context.depth)])


@dataclass(frozen=True)
class RecordedText:
    """The passes that wrote a text, and its number of new tokens, the first of which came without a draft.

    A pass writes one token more than it accepted; tokens beyond the end of the text are not counted.
    """

    passes: Sequence[DraftPass]
    num_tokens: int


def record_text(runner: ModelRunner, request: DecodeRequest, speculation: RecordedSpeculation) -> RecordedText:
    """Writes a text and returns its passes; the drafter remembers no text before."""
    speculation.drafter.forget()
    speculation.passes = []
    engine = Engine(runner, speculation=speculation)
    engine.add(request)
    (completion,) = engine.run().values()
    num_tokens = len(completion.tokens)
    passes = [each._replace(accepted=min(each.accepted, num_tokens - each.position - 1)) for each in speculation.passes]
    return RecordedText(passes, num_tokens)


def compute_medians(
    passes: Sequence[DraftPass], get_key: Callable[[DraftPass], int], get_seconds: Callable[[DraftPass], float]
) -> dict[int, float]:
    """The median seconds of the passes of each key, such as a number of draft tokens; in the order of the keys."""
    groups: defaultdict[int, list[float]] = defaultdict(list)
    for each in passes:
        groups[get_key(each)].append(get_seconds(each))
    return {key: median(groups[key]) for key in sorted(groups)}
