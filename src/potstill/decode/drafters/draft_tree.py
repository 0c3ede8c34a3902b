"""A draft while it grows level by level from the logits of a draft model."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.decode.drafters.drafter import Draft, DraftContext
from potstill.decode.sampling import penalize_repetition, token_probabilities
from potstill.ops.acceptance import chain_parents
from potstill.ops.categorical import find_likeliest, sample_without_replacement


class DraftTree:
    """The draft of one text while it grows. `frontier` are the nodes to expand; -1 is the text so far."""

    def __init__(self, context: DraftContext, unread: Sequence[int], widths: Sequence[int], confidence: float) -> None:
        self.context, self.unread, self.confidence = context, list(unread), confidence
        self.widths = list(widths[: context.depth])
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.rows: list[Tensor] = []
        self.frontier = [-1] if context.limit > 0 and self.widths else []
        self.num_read = 0
        self.depth = 0

    @property
    def chunk(self) -> tuple[list[int], list[int]]:
        """The tokens to read and their parents: the unread text as a chain, then the tree below its last token."""
        num_unread = len(self.unread)
        parents = [*range(-1, num_unread - 1), *(parent + num_unread for parent in self.parents)]
        return self.unread + self.tokens, parents

    def grow(self, logits: Float[Tensor, "T V"]) -> None:
        """Adds the next level from the logits after each token of the chunk."""
        self.num_read = len(self.tokens)
        next_frontier: list[int] = []
        for node in self.frontier:
            siblings, probabilities = self._choose(node, logits[max(len(self.unread), 1) + node])
            for token in siblings[: self.context.limit - len(self.tokens)]:
                next_frontier.append(len(self.tokens))
                self.tokens.append(token)
                self.parents.append(node)
                self.rows.append(probabilities)
        self.depth += 1
        is_full = self.depth == len(self.widths) or len(self.tokens) == self.context.limit
        self.frontier = [] if is_full else next_frontier

    def make_draft(self) -> Draft:
        """The draft; without probabilities at temperature 0, where its tokens are the likeliest ones."""
        probabilities = torch.stack(self.rows) if self.rows and self.context.sampling.temperature > 0 else None
        return Draft(tokens=self.tokens, parents=self.parents, probabilities=probabilities)

    def _choose(self, node: int, logits: Float[Tensor, " V"]) -> tuple[list[int], Tensor]:
        """The children of a node and the distribution that they are from; none where the model is not confident."""
        if self.confidence > 0 and float(logits.softmax(-1).amax()) < self.confidence:
            return [], logits
        sampling, width = self.context.sampling, self.widths[self.depth]
        if sampling.filters.repetition_penalty != 1:
            ids = torch.tensor([[*self.context.ids, *self._path(node)]])
            logits = penalize_repetition(logits[None], ids, torch.ones_like(ids, dtype=torch.bool), sampling)[0]
        if sampling.temperature == 0 and width == 1:
            return find_likeliest(logits[None]).tolist(), logits
        if sampling.temperature == 0:
            likeliest = logits.topk(width)
            return likeliest.indices[likeliest.values > -math.inf].tolist(), logits
        assert self.context.noise is not None, "a sampled draft needs noise"
        probabilities = token_probabilities(logits[None], sampling)[0].cpu()
        noise = self.context.noise[self.depth, :width]
        return sample_without_replacement(probabilities, noise).tolist(), probabilities

    def _path(self, node: int) -> list[int]:
        path: list[int] = []
        while node >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]


def pack_trees(
    trees: Sequence[tuple[Sequence[int], Sequence[int]]], *, device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"] | None]:
    """(tokens, parents) for one pass over trees of tokens with their parents; without parents if all are chains.

    Shorter rows end in tokens that continue a chain.
    """
    longest = max(len(tree_tokens) for tree_tokens, _ in trees)
    chain = torch.tensor(chain_parents(longest))
    tokens, parents = torch.zeros(len(trees), longest, dtype=torch.long), chain.repeat(len(trees), 1)
    for row, (tree_tokens, tree_parents) in enumerate(trees):
        tokens[row, : len(tree_tokens)] = torch.tensor(tree_tokens)
        parents[row, : len(tree_parents)] = torch.tensor(tree_parents)
    return tokens.to(device), None if bool((parents == chain).all()) else parents.to(device)
