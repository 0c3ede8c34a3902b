"""Acceptance rules of speculative decoding: which draft tokens a target keeps, and the token that it writes after them.

A draft is a tree of T tokens. `parents[i] < i` is the token before token i, or -1 for the text so far; a chain has
parents -1, 0, 1, ... The target reads the draft in one pass and gives T + 1 rows: row 0 follows the text so far, and
row i + 1 follows token i. `p` has these rows as probabilities. `q[i]` is the distribution that the draft drew token i
from, and siblings share it. Both come from the same temperature and filters.

All rules but `accept_typical` are lossless: the tokens follow the law of the target alone, whatever the draft is.
Noise is an argument. `draws[d]` in [0, 1) draws the token at depth d, and `coins[d, k]` decides on the k-th sibling
there. Both must be independent of the noise of the draft.

Sources: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), algorithm 1
and theorem 3.8; Chen et al. (arXiv:2302.01318); SpecInfer (arXiv:2305.09781), algorithm 2, for independent siblings;
EAGLE (arXiv:2401.15077) for distinct ones; Medusa (arXiv:2401.10774), section 3.4, for typical acceptance.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.ops.categorical import sample_tokens

TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3  # Medusa's own values


class Acceptance(NamedTuple):
    """The `path` of accepted draft tokens, as indices from the first on, and the `token` of the target after them."""

    path: list[int]
    token: int


def chain_parents(num_tokens: int) -> list[int]:
    """The parents of a chain."""
    return list(range(-1, num_tokens - 1))


def list_children(parents: Sequence[int]) -> list[list[int]]:
    """The children of the text so far, then those of each token, in the order of the draft."""
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for token, parent in enumerate(parents):
        assert parent < token, "a parent stands before its children"
        children[parent + 1].append(token)
    return children


def list_depths(parents: Sequence[int]) -> list[int]:
    """The number of draft tokens before each token on its path."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def residual(p: Float[Tensor, " V"], q: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """norm(max(p - q, 0)): the law of the token that replaces a rejected draft token.

    Where nothing remains, it is p. Exact arithmetic rejects no token there; rounding can.
    """
    remaining = (p - q).clamp(min=0)
    total = remaining.sum()
    return remaining / total if total > 0 else p


def accept_greedy(choices: Int[Tensor, " R"], tokens: Sequence[int], parents: Sequence[int]) -> Acceptance:
    """The longest path of tokens that the target chooses itself, and its choice after them.

    `choices` has the target's token after each row: its argmax, or a draw. The text is then the one of plain decoding.
    """
    children, path, row = list_children(parents), list[int](), 0
    while True:
        token = int(choices[row])
        match = next((child for child in children[row] if tokens[child] == token), None)
        if match is None:
            return Acceptance(path, token)
        path.append(match)
        row = match + 1


def accept_chain(
    p: Float[Tensor, "R V"],
    q: Float[Tensor, "T V"],
    tokens: Sequence[int],
    *,
    draws: Float[Tensor, " R"],
    coins: Float[Tensor, " T"],
) -> Acceptance:
    """Keeps token i with probability min(1, p_i / q_i), up to the first that fails; a draw from the residual follows.

    Where all are kept, the target draws one token more from its last row.
    """
    for i, token in enumerate(tokens):
        if not coins[i] * q[i, token] < p[i, token]:
            return Acceptance(list(range(i)), _draw(residual(p[i], q[i]), draws[i]))
    return Acceptance(list(range(len(tokens))), _draw(p[-1], draws[len(tokens)]))


def accept_tree(
    p: Float[Tensor, "R V"],
    q: Float[Tensor, "T V"] | None,
    tokens: Sequence[int],
    parents: Sequence[int],
    *,
    draws: Float[Tensor, " D"],
    coins: Float[Tensor, "D K"],
    replacement: bool = False,
) -> Acceptance:
    """Walks down the tree; at each node the siblings are tried in order, and what is left of p draws if all fail.

    A sibling c is kept with probability min(1, p(c) / q(c)); else p becomes norm(max(p - q, 0)). Siblings are distinct,
    so q then loses c and is normalized. With `replacement` they are independent draws, and q stays.

    Without q the siblings are a fixed choice of the draft. Each is kept with probability p(c), else p loses c and is
    normalized. One draw from p has that law, so `coins` are not read, and the text is the one of plain sampling.
    """
    if q is None:
        rows = torch.tensor([0, *(depth + 1 for depth in list_depths(parents))])
        return accept_greedy(sample_tokens(p, draws[rows]), tokens, parents)
    children, path, row = list_children(parents), list[int](), 0
    while True:
        siblings = children[row]
        depth = len(path)
        match, p_left = _accept_sibling(
            p[row], q[siblings], [tokens[c] for c in siblings], coins=coins[depth : depth + 1], replacement=replacement
        )
        if match is None:
            return Acceptance(path, _draw(p_left, draws[depth]))
        path.append(siblings[match])
        row = siblings[match] + 1


def accept_typical(
    p: Float[Tensor, "R V"],
    tokens: Sequence[int],
    parents: Sequence[int],
    *,
    draws: Float[Tensor, " D"],
    epsilon: float = TYPICAL_EPSILON,
    delta: float = TYPICAL_DELTA,
) -> Acceptance:
    """The longest path of typical tokens, p(x) > min(epsilon, delta exp(-H(p))), then a draw from p. Lossy.

    Of paths of one length the likeliest is kept. Medusa's first token, which is always kept, is here the last token of
    the text so far.
    """
    thresholds = typical_threshold(p, epsilon=epsilon, delta=delta)
    paths: list[list[int]] = [[]]  # of row 0, then of each token; a token whose path is not typical has none
    scores, best = [0.0], 0
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        probability = float(p[parent + 1, token])
        is_kept = scores[parent + 1] > -math.inf and probability > thresholds[parent + 1]
        paths.append([*paths[parent + 1], i] if is_kept else [])
        scores.append(scores[parent + 1] + math.log(probability) if is_kept else -math.inf)
        if (len(paths[-1]), scores[-1]) > (len(paths[best]), scores[best]):
            best = i + 1
    return Acceptance(paths[best], _draw(p[best], draws[len(paths[best])]))


def typical_threshold(
    p: Float[Tensor, "N V"], *, epsilon: float = TYPICAL_EPSILON, delta: float = TYPICAL_DELTA
) -> Float[Tensor, " N"]:
    """min(epsilon, delta exp(-H(p))) of each row; H is the entropy in nats."""
    entropy = -torch.xlogy(p, p).sum(-1)
    return (delta * torch.exp(-entropy)).clamp(max=epsilon)


def acceptance_rate(p: Float[Tensor, "*N V"], q: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """sum_x min(p, q) = 1 - TV(p, q): the probability that the target keeps a token drawn from q."""
    return torch.minimum(p, q).sum(-1)


def count_passes(matches: Bool[Tensor, "T K"], draft_length: int) -> int:
    """The passes of a target that writes T + 1 tokens greedily, the first without a pass, with drafts of a chain.

    `matches[t, k]` says whether the draft behind token t has the target's token t + 1 + k at its place k, where all
    places before are right. The target keeps the leading matches of a draft, and adds one token. (By definition)
    """
    kept_counts = matches[:, :draft_length].long().cumprod(-1).sum(-1).tolist()
    position = passes = 0
    while position < len(kept_counts):
        position += kept_counts[position] + 1
        passes += 1
    return passes


def unfold_matches(agreement: Bool[Tensor, " T"], longest: int) -> Bool[Tensor, "T K"]:
    """The `matches` of a draft that reads what it drafts, from its agreement with each of the T tokens.

    Where all places before are right, such a draft has read the target's own text: matches[t, k] = agreement[t + k].
    """
    padded = torch.cat([agreement, agreement.new_zeros(longest - 1)])
    return padded.unfold(0, longest, 1)


def compute_mean_tokens(alpha: float, draft_length: int) -> float:
    """(1 - alpha^(g+1)) / (1 - alpha): tokens per pass of the target, for a chain of g tokens.

    `alpha` is the probability that a token is kept, the same for all tokens. (Leviathan et al., equation 1)
    """
    return compute_mean_tokens_by_position([alpha] * draft_length)


def compute_mean_tokens_by_position(rates: Sequence[float]) -> float:
    """1 + sum_i prod_{j <= i} a_j: tokens per pass of the target, for chains of g tokens or trees of g levels.

    `rates[i - 1]` is a_i, the share of passes that keep a token at position i among those that keep all before it. A
    pass whose draft ends earlier keeps none there. With equal rates this is `compute_mean_tokens`. (Leviathan et al.,
    equation 1, without its assumption that acceptances are independent and alike)
    """
    total, survival = 1.0, 1.0
    for rate in rates:
        survival *= rate
        total += survival
    return total


def find_equal_rate(rates: Sequence[float]) -> float:
    """alpha, the one probability that a token is kept, from the rates by position: kept tokens over tried ones.

    alpha = sum_i S_i / sum_i S_{i-1}, with S_0 = 1. S_i = prod_{j <= i} a_j is the share of passes that keep i tokens.
    It is the estimate of the largest likelihood. (Leviathan et al., definition 3.1, for a chain of g tokens)
    """
    survivals = [1.0]
    for rate in rates:
        survivals.append(survivals[-1] * rate)
    return sum(survivals[1:]) / sum(survivals[:-1]) if rates else 0.0


def compute_operation_factor(alpha: float, draft_length: int, operation_ratio: float) -> float:
    """(1 - alpha) (g c + g + 1) / (1 - alpha^(g+1)): arithmetic operations relative to plain decoding.

    `operation_ratio` c is the operations of the draft for a token over those of the target. (Leviathan et al.,
    theorem 3.11)
    """
    return (draft_length * operation_ratio + draft_length + 1) / compute_mean_tokens(alpha, draft_length)


def speed_up(alpha: float, draft_length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """compute_mean_tokens / (g c + v): tokens per unit of time. (Leviathan et al., theorem 3.8)

    `draft_cost` c is the time of a draft token and `verify_cost` v that of reading the draft. In plain steps they give
    the speed relative to plain decoding.
    """
    return divide_by_cost(compute_mean_tokens(alpha, draft_length), draft_length, draft_cost, verify_cost)


def divide_by_cost(mean_tokens: float, draft_length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """mean_tokens / (g c + v): tokens per unit of time, as `speed_up`, for any tokens per pass."""
    return mean_tokens / (draft_length * draft_cost + verify_cost)


def best_draft_length(alpha: float, draft_cost: float, *, longest: int = 16) -> int:
    """The length from 0 to `longest` of the largest `speed_up`; 0 where no draft pays, which is alpha <= c."""
    return max(range(longest + 1), key=lambda length: speed_up(alpha, length, draft_cost))


def _accept_sibling(
    p: Float[Tensor, " V"],
    q: Float[Tensor, "K V"],
    tokens: Sequence[int],
    *,
    coins: Float[Tensor, "1 C"],
    replacement: bool,
) -> tuple[int | None, Float[Tensor, " V"]]:
    """The index of the sibling that is kept, or None and what is left of p."""
    if not tokens:
        return None, p
    q_left = q[0]
    for k, token in enumerate(tokens):
        if coins[0, k] * q_left[token] < p[token]:
            return k, p
        p = residual(p, q_left)
        if not replacement:
            q_left = q_left.index_fill(0, torch.tensor(token), 0.0)
            q_left = q_left / q_left.sum().clamp(min=torch.finfo(q.dtype).tiny)
    return None, p


def _draw(p: Float[Tensor, " V"], noise: Float[Tensor, ""]) -> int:
    return int(sample_tokens(p[None], noise[None]))
