"""A partial distribution: the probabilities of its likeliest tokens, and the total of each class of other tokens.

    p~ = (p[i_1], ..., p[i_k], r_1(p), ..., r_C(p))        r_c(p) = sum of p over the tokens of class c not among the i

Merging tokens never increases an f-divergence (the data-processing inequality): 0 <= D(p~||q~) <= D(p||q), and the
teacher itself is a minimum. Both are false if the rest is dropped or the listed part renormalized: then the minimum is
a distribution other than the teacher's. With k = V, D(p~||q~) = D(p||q). One class is the plain tail; more classes
describe the tail better for few bytes (LOG.md, "what a cache should keep of a distribution").

The derivative of D(p~||q~) by the student's logits z, from its derivative d by the logits of q~:

    d[j]                      for token i_j
    d[k + c] q[v] / r_c(q)    for any other token v of class c
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.ops.precision import upcast

Differentiate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (teacher [N K], student [N K]) -> [N], [N K]


@dataclass(frozen=True)
class CoarseDistribution:
    """N distributions over V tokens, each as up to K of its tokens and the totals of the C classes of all others.

    `log_p[n, j]` belongs to token `ids[n, j]`; log_p = -inf at any id of the row pads a shorter row. `log_rest[n, c]`
    is log r_c, -inf if nothing is left. `members[v, c]` is 1 if token v is in class c, else 0.
    """

    ids: Int[Tensor, "N K"]
    log_p: Float[Tensor, "N K"]
    log_rest: Float[Tensor, "N C"]
    members: Float[Tensor, "V C"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Int[Tensor, " M"]) -> "CoarseDistribution":
        return replace(self, ids=self.ids[rows], log_p=self.log_p[rows], log_rest=self.log_rest[rows])

    def select_rows(self, rows: Int[Tensor, " M"]) -> "CoarseDistribution":
        """The rows of these indices; those of consecutive indices are a view."""
        first = int(rows[0]) if len(rows) else 0
        is_slice = torch.equal(rows, torch.arange(first, first + len(rows), device=rows.device))
        return self[slice(first, first + len(rows)) if is_slice else rows]

    @property
    def buckets(self) -> Float[Tensor, "N B"]:
        """log p~: the listed tokens, then the classes."""
        return torch.cat([self.log_p, self.log_rest], -1)


def coarsen(
    logits: Float[Tensor, "N V"], k: int, members: Float[Tensor, "V C"], *, mass: float = 1.0
) -> CoarseDistribution:
    """softmax(logits) as its `k` likeliest tokens, or fewer (at least one) if those already have the probability
    `mass`."""
    log_p = upcast(logits).log_softmax(-1)
    top, ids = log_p.topk(min(k, log_p.shape[1]), -1)
    if mass < 1:  # rounding would reach 1 before the last token
        surplus = (top.exp().cumsum(-1) - top.exp()) >= mass
        surplus[:, 0] = False
        ids, top = torch.where(surplus, ids[:, :1], ids), top.masked_fill(surplus, -torch.inf)
    class_mass = log_p.exp().scatter(-1, ids, 0.0) @ members.to(log_p.dtype)
    return CoarseDistribution(ids, top, class_mass.log(), members)


def token_log_prob(distribution: CoarseDistribution, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log p of one token for each row; unlisted tokens of a class have equal shares of its total."""
    is_token = (distribution.ids == tokens[:, None]) & ~distribution.log_p.isneginf()
    listed_log_p = distribution.log_p.masked_fill(~is_token, -torch.inf).amax(-1)
    unlisted = distribution.members.sum(0) - _count_listed(distribution)
    token_class = distribution.members[tokens].argmax(-1, keepdim=True)
    class_log_p = (distribution.log_rest - unlisted.clamp_min(1).log()).gather(-1, token_class)[:, 0]
    return torch.where(is_token.any(-1), listed_log_p, class_log_p)


def tail_probabilities(logits: Float[Tensor, "N V"], k: int) -> Float[Tensor, "N V"]:
    """softmax(logits) with 0 at the `k` likeliest tokens of each row."""
    p = logits.softmax(-1)
    return p.scatter(-1, p.topk(min(k, p.shape[1]), -1).indices, 0.0)


def concatenate(parts: Sequence[CoarseDistribution]) -> CoarseDistribution:
    """The rows of all `parts`, which have the same classes, one after the other, padded to the widest."""
    width = max(part.ids.shape[1] for part in parts)
    ids = [_pad_columns(part.ids, width, part.ids[:, :1]) for part in parts]
    log_p = [_pad_columns(part.log_p, width, part.log_p.new_tensor(-torch.inf)) for part in parts]
    log_rest = [part.log_rest for part in parts]
    return CoarseDistribution(torch.cat(ids), torch.cat(log_p), torch.cat(log_rest), parts[0].members)


def coarse_divergence(
    divergence: Callable[[Tensor, Tensor], Tensor], teacher: CoarseDistribution, student: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """D(p~||q~), the definition; differentiable by the student's logits."""
    is_listed = _listed_mask(teacher, student.shape[1])
    listed_logits = student.gather(-1, teacher.ids).masked_fill(teacher.log_p.isneginf(), -torch.inf)
    class_logits = [_masked_logsumexp(student, (member > 0) & ~is_listed) for member in teacher.members.T]
    return divergence(teacher.buckets.to(student.dtype), torch.cat([listed_logits, torch.stack(class_logits, -1)], -1))


def coarse_divergence_with_gradient(
    differentiate: Differentiate, teacher: CoarseDistribution, student: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
    """D(p~||q~) and its derivative by the student's logits; `differentiate` gives both over the buckets."""
    is_filler, members, num_listed = teacher.log_p.isneginf(), teacher.members.to(student.dtype), teacher.ids.shape[1]
    listed_logits = student.gather(-1, teacher.ids).masked_fill(is_filler, -torch.inf)
    largest = student.amax(-1, keepdim=True)
    unlisted = (student - largest).exp_().scatter_(-1, teacher.ids, 0.0)
    mass = unlisted @ members
    smallest = torch.finfo(mass.dtype).tiny  # neither the loss nor 1 / mass overflows
    mass = torch.where(teacher.log_rest.isneginf(), mass, mass.clamp_min(smallest))
    values, delta = differentiate(
        teacher.buckets.to(student.dtype), torch.cat([listed_logits, mass.log() + largest], -1)
    )
    scale = torch.where(mass > 0, delta[:, num_listed:] / mass, 0.0)
    return values, unlisted.mul_(scale @ members.T).scatter_add_(
        -1, teacher.ids, delta[:, :num_listed].masked_fill(is_filler, 0.0)
    )


def _count_listed(distribution: CoarseDistribution) -> Float[Tensor, "N C"]:
    """The number of listed tokens of each class."""
    is_listed = (~distribution.log_p.isneginf()).to(distribution.members.dtype)
    zeros = is_listed.new_zeros(distribution.log_rest.shape)
    return zeros.scatter_add_(-1, distribution.members.argmax(-1)[distribution.ids], is_listed)


def _listed_mask(teacher: CoarseDistribution, vocabulary: int) -> Bool[Tensor, "N V"]:
    """Which tokens are listed."""
    is_listed = (~teacher.log_p.isneginf()).to(torch.uint8)
    zeros = is_listed.new_zeros(len(is_listed), vocabulary)
    return zeros.scatter_reduce_(-1, teacher.ids, is_listed, "amax").bool()


def _masked_logsumexp(logits: Float[Tensor, "N V"], mask: Bool[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """logsumexp over the tokens of `mask`; -inf, with gradient 0, if there are none."""
    is_empty = ~mask.any(-1)
    # the gradient of a logsumexp of nothing would be NaN
    masked_logits = torch.where(is_empty[:, None], 0.0, logits.masked_fill(~mask, -torch.inf))
    return masked_logits.logsumexp(-1).masked_fill(is_empty, -torch.inf)


def _pad_columns(values: Tensor, width: int, fill: Tensor) -> Tensor:
    num_missing = width - values.shape[1]
    return torch.cat([values, fill.expand(len(values), num_missing)], -1) if num_missing else values
