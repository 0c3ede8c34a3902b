"""Speculation: a drafter proposes tokens, the target reads them in one pass, and an acceptance rule keeps some.

Greedy decoding keeps the longest path of its own argmax. Sampling keeps the target's law: drafts without probabilities
are compared with the target's own draws, so their text is that of plain decoding; drawn drafts go through rejection
sampling, with noise that follows from the seed and the index of the token alone. A plain step is an empty draft.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.decode.active_text import ActiveText
from potstill.decode.draft_length import CostLength, FixedLength
from potstill.decode.drafters.draft_tree import pack_trees
from potstill.decode.drafters.drafter import Draft, DraftContext, Drafter
from potstill.decode.drawing import DrawPoint, compute_probabilities, draw_tokens
from potstill.decode.runner import ModelRunner
from potstill.ops.acceptance import (
    Acceptance,
    accept_greedy,
    accept_tree,
    accept_typical,
    list_children,
    list_depths,
)

MOST_NODES = 64  # of a tree


@dataclass
class DraftStats:
    """Draft tokens proposed and kept, and the same by position in the draft: its depth for a tree."""

    drafted: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def record(self, draft: Draft, path: Sequence[int]) -> None:
        """Counts a draft and the path of it that was kept."""
        depth = count_levels(draft)
        self.drafted_at += [0] * (depth - len(self.drafted_at))
        self.accepted_at += [0] * (depth - len(self.accepted_at))
        for position in range(depth):
            self.drafted_at[position] += 1
            self.accepted_at[position] += position < len(path)
        self.drafted += len(draft.tokens)
        self.accepted += len(path)


@dataclass(kw_only=True)
class Speculation:
    """A drafter with the length of its drafts. `typical` acceptance, Medusa's, changes what sampling writes.

    A draft has at most `nodes` tokens, and a node at most `siblings` children.
    """

    drafter: Drafter
    length: FixedLength | CostLength
    nodes: int = MOST_NODES
    siblings: int = 1
    typical: bool = False
    draft_seconds: float = 0.0

    def check(self, runner: ModelRunner) -> None:
        """Raises UsageError for a tree deeper than the context, UnsupportedModel for drafts that cannot be read."""
        longest = self.length.longest
        if self.drafter.takes_hidden and not runner.probe.has_head_on_hidden_states:
            raise UnsupportedModel(
                f"{type(runner.model).__name__} has no known head on its last hidden states, which this draft reads; "
                "choose another --draft"
            )
        if longest >= runner.context:
            raise UsageError(
                f"a draft of {longest} tokens in a row does not fit in the {runner.context} tokens of context; lower "
                f"--draft-length"
            )
        if self.siblings > 1 and not runner.takes_trees:
            raise UnsupportedModel(
                f"{type(runner.model).__name__} keeps a state that one chain of tokens can continue, but no tree; omit "
                "--tree"
            )
        if not runner.takes_drafts:
            raise UnsupportedModel(
                f"{type(runner.model).__name__} keeps a state that cannot take back tokens, so it verifies no drafts; "
                "omit --draft"
            )

    def propose(self, texts: Sequence[ActiveText]) -> list[Draft]:
        """The drafts of the texts, of the length that `length` chooses and never longer than the text may become."""
        start, depth = time.perf_counter(), self.length.choose()
        contexts = [self._make_context(text, depth) for text in texts]
        drafts = self.drafter.propose_batch(contexts)
        self.draft_seconds = time.perf_counter() - start
        return drafts

    def record(self, drafts: Sequence[Draft], acceptances: Sequence[Acceptance], *, verify_seconds: float) -> None:
        """Learns from a pass that verified these drafts."""
        depths = [count_levels(draft) for draft in drafts]
        for depth, acceptance in zip(depths, acceptances, strict=True):
            self.length.record(depth, len(acceptance.path))
        self.length.record_seconds(draft=self.draft_seconds, verify=verify_seconds, length=max(depths))

    def _make_context(self, text: ActiveText, depth: int) -> DraftContext:
        depth = max(min(depth, text.num_tokens_left - 1), 0)
        first = text.num_new_tokens
        return DraftContext(
            slot=text.slot,
            ids=text.ids,
            limit=self.nodes if depth else 0,
            depth=depth,
            sampling=text.sampling,
            noise=text.noise.make_rows("draft", range(first, first + depth), self.siblings),
        )


def accept_drafts(
    texts: Sequence[ActiveText],
    drafts: Sequence[Draft],
    logits: Sequence[Float[Tensor, "N V"]],
    weights: Sequence[float],
    *,
    typical: bool = False,
) -> list[Acceptance]:
    """What each text keeps of its draft, and the token after it.

    The rows of `logits` are those of the texts in order: 1 + T rows for a draft of T tokens, the first of which follows
    the text itself.
    """
    points = [point for text, draft in zip(texts, drafts, strict=True) for point in list_points(text, draft)]
    sizes = [len(draft.tokens) + 1 for draft in drafts]
    if not typical and all(draft.probabilities is None for draft in drafts):
        choices = torch.tensor(draw_tokens(points, logits, weights)).split(sizes)
        return [accept_greedy(rows, draft.tokens, draft.parents) for rows, draft in zip(choices, drafts, strict=True)]
    p = compute_probabilities(points, logits, weights).split(sizes)
    return [_accept(text, draft, rows, typical=typical) for text, draft, rows in zip(texts, drafts, p, strict=True)]


def list_points(text: ActiveText, draft: Draft) -> list[DrawPoint]:
    """Where the tokens after the text and after each draft token are drawn."""
    paths: list[list[int]] = [[]]
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        paths.append([*paths[parent + 1], token])
    first, sampling = text.num_new_tokens, text.sampling
    needs_ids = sampling.filters.repetition_penalty != 1
    return [
        DrawPoint([*text.ids, *path] if needs_ids else text.ids, text.noise[first + len(path)], sampling)
        for path in paths
    ]


def count_levels(draft: Draft) -> int:
    """The length of the longest path."""
    return max(list_depths(draft.parents), default=-1) + 1


def select_rows(logits: Float[Tensor, "B T V"], drafts: Sequence[Draft]) -> Float[Tensor, "N V"]:
    """The rows after the last token of each text and after its draft tokens, text by text."""
    sizes = [len(draft.tokens) + 1 for draft in drafts]
    if all(size == logits.shape[1] for size in sizes):
        return logits.flatten(0, 1)
    return torch.cat([rows[:size] for rows, size in zip(logits, sizes, strict=True)])


def pack_drafts(
    last_tokens: Sequence[int], drafts: Sequence[Draft], *, device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"] | None]:
    """(tokens, parents) for one pass, as `pack_trees`: the last token of each text, then its draft."""
    trees = [
        ([last, *draft.tokens], [-1, *(parent + 1 for parent in draft.parents)])
        for last, draft in zip(last_tokens, drafts, strict=True)
    ]
    return pack_trees(trees, device=device)


def _accept(text: ActiveText, draft: Draft, p: Float[Tensor, "N V"], *, typical: bool) -> Acceptance:
    depth, first = count_levels(draft), text.num_new_tokens
    draws = torch.tensor([text.noise[first + d] for d in range(depth + 1)], dtype=torch.float64)
    if typical:
        return accept_typical(p, draft.tokens, draft.parents, draws=draws)
    siblings = max(map(len, list_children(draft.parents)))
    coins = text.noise.make_rows("accept", range(first, first + depth + 1), siblings)
    return accept_tree(p, draft.probabilities, draft.tokens, draft.parents, draws=draws, coins=coins)
