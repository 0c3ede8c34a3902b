"""What every drafter gives: a draft of the next tokens of a text, for the target to verify.

A drafter is one file with one class, one row in `registry.py`, and no test of its own for losslessness: the laws of
`tests/decode/drafters/test_laws.py` run over all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from potstill.decode.sampling import Sampling
from potstill.ops.acceptance import chain_parents


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A tree of `tokens`. `parents[i] < i` is the token before token i, or -1 for the text so far.

    `probabilities[i]` is the distribution that token i was drawn from, in float64; siblings are drawn from it without
    replacement. It is None if the tokens are a fixed choice, such as an n-gram or the likeliest tokens.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    probabilities: Float[Tensor, "T V"] | None = None

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.parents), "every token has a parent"
        assert all(parent < token for token, parent in enumerate(self.parents)), "a parent stands before its children"

    @classmethod
    def chain(cls, tokens: Sequence[int], probabilities: Float[Tensor, "T V"] | None = None) -> "Draft":
        """Each token follows the one before it."""
        return cls(tokens=tokens, parents=chain_parents(len(tokens)), probabilities=probabilities)


@dataclass(frozen=True, kw_only=True)
class DraftContext:
    """A text that wants a draft: its slot, its ids so far, and how its tokens are drawn.

    A draft has at most `limit` tokens, and its paths at most `depth`. `noise[d, k]` in [0, 1) draws the k-th sibling at
    depth d; it is independent of the noise of the verification.
    """

    slot: int
    ids: Sequence[int]
    limit: int
    depth: int
    sampling: Sampling
    noise: Float[Tensor, "D K"] | None = field(default=None, repr=False)


class Drafter:
    """Proposes drafts for the texts in the slots of an engine. The default does nothing but `propose`."""

    takes_hidden = False  # whether `start` and `accept` need the target's last hidden states

    def start(self, slot: int, ids: Sequence[int], hidden: Float[Tensor, "T D"] | None = None) -> None:
        """A text begins in `slot` with the prompt `ids`."""

    def propose(self, context: DraftContext) -> Draft:
        """The draft of one text; an empty draft is a plain step."""
        raise NotImplementedError

    def propose_batch(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """The drafts of several texts; drafters with a model read them in one pass."""
        return [self.propose(context) for context in contexts]

    def accept(self, slot: int, path: Sequence[int], token: int, hidden: Float[Tensor, "P D"] | None = None) -> None:
        """The target kept these tokens of the last draft, indices from the first on, and wrote `token` after them.

        `hidden` has the states of the token before the draft and of the kept ones.
        """

    def free(self, slot: int) -> None:
        """The text of `slot` has ended."""

    def forget(self) -> None:
        """Forgets the texts that have ended, for a drafter that learns from them."""
