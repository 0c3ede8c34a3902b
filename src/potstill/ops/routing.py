"""Routing of tokens to experts: the choice, the dispatch that computes nothing else, and the loss of an uneven load.

With router logits z, p = softmax(z), and S the k experts of a token with the largest p, its output is

    y = sum over e in S of w_e E_e(x)

    softmax            w_e = p_e                          Switch Transformers (arXiv:2101.03961, Eq. 2)
    normalized         w_e = p_e / sum over S of p        Mixtral (arXiv:2401.04088, section 2.1)
    straight_through   the same values; the sum is a constant in the gradient

Where k = 1, `normalized` weights are 1, and the router gets no gradient from the output. `straight_through` weights are
1 too, and the router gets the gradient of log p_e where `softmax` gives that of p_e.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.ops.attention import HALF_DTYPES
from potstill.ops.layout import apply_padded
from potstill.ops.precision import get_product_dtype, upcast

Weighting = Literal["softmax", "normalized", "straight_through"]
Function = Callable[[Tensor], Tensor]


class Routes(NamedTuple):
    """The k experts of each token and their weights, likeliest first; the experts of a token differ."""

    experts: Int[Tensor, "N k"]
    weights: Float[Tensor, "N k"]


def choose_experts(router_logits: Float[Tensor, "N E"], k: int, weighting: Weighting) -> Routes:
    """The `k` likeliest experts of each token, with weights in float32 at least; `k` is at most E."""
    p, experts = _softmax(router_logits).topk(k, -1)
    if weighting == "softmax":
        return Routes(experts, p)
    total = p.sum(-1, keepdim=True)
    return Routes(experts, p / (total.detach() if weighting == "straight_through" else total))


def dispatch(x: Float[Tensor, "N D"], routes: Routes, experts: Sequence[Function]) -> Float[Tensor, "N D"]:
    """y_n = sum over k of w_nk E_k(x_n). An expert computes the rows of its own tokens, in one call.

    Tokens are sorted by expert, and the outputs are sorted back. An expert without a token is not called, except where
    gradients are recorded: then it computes 0 rows, so that its parameters have zero gradients on every rank.
    It equals `dense_dispatch`. It synchronizes a GPU once, to learn the number of tokens of each expert. On a CPU,
    products in half precision get round numbers of rows (`layout.pad_to_multiple`).
    """
    num_tokens, k = routes.experts.shape
    choices = routes.experts.flatten()
    order = choices.argsort(stable=True)
    counts = torch.bincount(choices, minlength=len(experts)).tolist()
    is_skipped = num_tokens > 0 and not torch.is_grad_enabled()
    is_padded = x.device.type == "cpu" and get_product_dtype(x) in HALF_DTYPES
    parts = [part for part in zip(experts, x[order // k].split(counts), strict=True) if len(part[1]) or not is_skipped]
    outputs = torch.cat([apply_padded(expert, rows) if is_padded else expert(rows) for expert, rows in parts])
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return (outputs[places].unflatten(0, (num_tokens, k)) * routes.weights[..., None]).sum(1).to(x.dtype)


def dense_dispatch(x: Float[Tensor, "N D"], routes: Routes, experts: Sequence[Function]) -> Float[Tensor, "N D"]:
    """The definition of `dispatch`: every expert computes every token, and has weight 0 where it is not chosen."""
    weights = routes.weights.new_zeros(len(x), len(experts)).scatter(1, routes.experts, routes.weights)
    outputs = torch.stack([expert(x) for expert in experts], 1)
    return (weights[..., None] * outputs).sum(1).to(x.dtype)


def load_balancing_loss(router_logits: Float[Tensor, "N L E"], *, k: int = 1) -> Float[Tensor, ""]:
    """E sum over experts i of f_i P_i of each of L layers, the mean over layers, in float32 at least.

    f_i is the share of the k N choices that go to expert i, P_i the mean of p_i over N tokens; f has no gradient. An
    expert that a layer does not have has the logit -inf, and E counts the experts of each layer. `k` is at most E.

    Source: Switch Transformers (arXiv:2101.03961, Eq. 4 to 6), where k = 1.
    """
    p = _softmax(router_logits)
    num_experts = (router_logits > -torch.inf).any(0).sum(-1)  # [L]
    choices = p.topk(k, -1).indices
    share = (1.0 / num_experts.clamp(max=k)).to(p)[:, None].expand_as(choices)
    f = torch.zeros_like(p).scatter_(-1, choices, share).mean(0)
    return (num_experts * (f * p.mean(0)).sum(-1)).mean()


def _softmax(logits: Tensor) -> Tensor:
    return upcast(logits).softmax(-1)
