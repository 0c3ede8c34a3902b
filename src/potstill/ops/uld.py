"""The distance between two distributions over different vocabularies, by their sorted probabilities (ULD).

    U(p, q) = sum over k of |p_(k) - q_(k)|        both sorted descending, the shorter one padded with zeros

`uld_by_sorting` is the definition. Sorting costs tens of milliseconds for each row and is not necessary. With N_p(x)
the number of entries of p above x, U is the area between two step functions:

    U(p, q) = integral from 0 to 1 of |N_p(x) - N_q(x)| dx

`uld_by_bins` cuts [0, 1] into bins of relative width 2^-10 (a float's sign, exponent and first bits). In each bin it
takes the absolute value of the area instead of the area of the absolute value. Both are equal unless the step functions
cross in the bin. A bin of width w with n entries then loses at most w n / 2, and w is at most 2^-10 times any entry in
it. All entries together sum to 2, and entries below 2^-40 count as 0, so

    U - 2^-10 - (V_p + V_q) 2^-40  <=  uld_by_bins  <=  U + (V_p + V_q) 2^-40

The gradient is that of this value: entries of the student in one bin get the same sign. The definition may give them +1
and -1, but such entries differ by at most a thousandth, and a small change would swap them.

The worst case is an error of a thousandth; for comparison, bfloat16 logits around 16 change every probability by 3 %.
Real rows lose far less (`tests/ops/test_uld.py`). Areas are integers. One scatter for each side adds to a bin the count
of an entry and its distance from the lower edge, packed into one int64; distances are in units in the last place. So
the result does not depend on the order of the sums. It is 0 if both sides have the same entries, and the sign of each
area is exact.

Logits computed in bfloat16 have few distinct values: some thousands among 262,144. `uld_by_tally` counts these first,
as integers, and computes one probability for each distinct value instead of for each entry.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution

EXPONENTS = 40  # powers of two that have bins; smaller entries count as 0
BIN_BITS = 10  # bins in each power of two, as a power of two
LOW_BITS = 23 - BIN_BITS  # bits of a float32 that distinguish entries of one bin
FIRST_BITS = ((127 - EXPONENTS) << 23) - (
    1 << LOW_BITS
)  # the bits at the start of bin 0, the bin of entries that count as 0
BINS = (EXPONENTS << BIN_BITS) + 2  # the last one holds 1 itself
COUNT_UNIT = 1 << 40  # one entry, above the distances of all entries in a bin
NUM_PATTERNS = 2**16  # bit patterns of a bfloat16
MIN_TALLY_WIDTH = 2 * NUM_PATTERNS  # from this many entries on, counting equal ones first is faster


def uld_by_sorting(p: Float[Tensor, "N V"], q: Float[Tensor, "N W"]) -> Float[Tensor, " N"]:
    """The definition, by sorting; differentiable by both sides."""
    width = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[1])) for x in (p, q))
    return (p - q).abs().sum(-1)


def uld_by_bins(p: Float[Tensor, "N V"], q: Float[Tensor, "N W"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N W"]]:
    """(U, its derivative by q) from probabilities, in float32.

    The derivative by an entry is the sign of the area of its bin: 1 if q has too much there.
    """
    bins, distances = _assign_bins(q)
    areas = torch.zeros(len(q), BINS, dtype=torch.int64, device=q.device)
    areas.scatter_add_(1, bins, distances)
    areas.scatter_add_(1, *_negate(_assign_bins(p)))
    values, signs = _compute_area(areas, q.dtype)
    return values, signs.gather(1, bins)


def uld_by_tally(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N W"], temperature: float = 1.0
) -> tuple[Float[Tensor, " N"], Float[Tensor, "N W"]]:
    """`uld_by_bins` of softmax(teacher / tau) and softmax(student / tau), for float32 logits that are exact in
    bfloat16."""
    areas = torch.zeros(len(student), BINS, dtype=torch.int64, device=student.device)
    flat = areas.view(-1)
    p, q = _count_patterns(teacher, temperature), _count_patterns(student, temperature)
    for tally, sign in ((p, -1), (q, 1)):
        bins, distances = _assign_bins(tally.value)
        flat.index_add_(0, tally.row * BINS + bins, distances.mul_(tally.occurrences), alpha=sign)
    values, signs = _compute_area(areas, student.dtype)
    slope = torch.zeros(len(student), NUM_PATTERNS, dtype=student.dtype, device=student.device)
    slope[q.row, q.pattern] = signs[q.row, bins]
    return values, slope.gather(1, q.patterns)


def is_bfloat16_valued(logits: Tensor) -> bool:
    """Whether these float32 numbers are exact in bfloat16."""
    if logits.dtype != torch.float32 or not logits.numel():
        return False
    return int((logits.view(torch.int32) & (NUM_PATTERNS - 1)).amax()) == 0


@dataclass(frozen=True)
class ULDRows:
    """tau U(softmax(teacher / tau), softmax(student / tau)), for a teacher [C W] of any vocabulary.

    tau and not tau^2 as in a divergence: U is of first order in the difference of the logits, so its gradient falls as
    1 / tau.
    """

    temperature: float = 1.0
    teacher: str = "teacher"

    def __call__(
        self,
        student: Float[Tensor, "C V"],
        frozen: Mapping[str, Tensor | CoarseDistribution],
        targets: Int[Tensor, " C"],
    ) -> Float[Tensor, " C"]:
        q, values, slope = self._compute_distance(student, frozen)
        return self.temperature * (values + ((q - q.detach()) * slope).sum(-1))

    def values_and_gradient(
        self,
        student: Float[Tensor, "C V"],
        frozen: Mapping[str, Tensor | CoarseDistribution],
        targets: Int[Tensor, " C"],
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and q (s - <q, s>), with s the derivative by q; tau cancels."""
        q, values, slope = self._compute_distance(student, frozen)
        slope.sub_(torch.linalg.vecdot(q, slope)[:, None])
        return self.temperature * values, q.mul_(slope)

    def _compute_distance(
        self, student: Tensor, frozen: Mapping[str, Tensor | CoarseDistribution]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, U, and the derivative of U by q."""
        teacher, tau = frozen[self.teacher], self.temperature
        assert isinstance(teacher, Tensor), "ULD needs the probability of every token"
        q = (student if tau == 1 else student / tau).softmax(-1)
        if teacher.shape[1] >= MIN_TALLY_WIDTH and is_bfloat16_valued(teacher) and is_bfloat16_valued(student.detach()):
            return q, *uld_by_tally(teacher, student.detach(), tau)
        return q, *uld_by_bins((teacher if tau == 1 else teacher / tau).softmax(-1), q.detach())


class _Tally(NamedTuple):
    """Distinct values in rows of bfloat16-valued logits: bits `pattern[m]` occur `occurrences[m]` times in `row[m]`.

    `value[m]` is the probability of each occurrence; `patterns` are the bits of every entry.
    """

    patterns: Int[Tensor, "N V"]
    row: Int[Tensor, " M"]
    pattern: Int[Tensor, " M"]
    occurrences: Int[Tensor, " M"]
    value: Float[Tensor, " M"]


def _count_patterns(logits: Float[Tensor, "N V"], temperature: float) -> _Tally:
    patterns = (logits.view(torch.int32) >> 16).bitwise_and_(NUM_PATTERNS - 1).long()
    counts = torch.zeros(len(logits), NUM_PATTERNS, dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, patterns, counts.new_ones(1, 1).expand_as(patterns))
    row, pattern = counts.nonzero(as_tuple=True)
    occurrences = counts[row, pattern]
    value = (pattern << 16).int().view(torch.float32) / temperature
    largest = logits.amax(-1) / temperature
    value = (value - largest[row]).exp_()
    total = torch.zeros_like(largest, dtype=torch.float64).index_add_(0, row, (value * occurrences).double())
    return _Tally(
        patterns, row, pattern, occurrences, value / total.float()[row]
    )  # rounded from float64, so the order of the sum does not matter


def _compute_area(areas: Int[Tensor, "N B"], dtype: torch.dtype) -> tuple[Float[Tensor, " N"], Float[Tensor, "N B"]]:
    """U and the sign of the area in each bin, from the student's counts and distances minus the teacher's."""
    counts = (areas + COUNT_UNIT // 2) >> 40  # rounds, since distances may sum to less than 0
    above = counts.sum(-1, keepdim=True) - counts.cumsum(-1)
    areas = areas.sub_(counts << 40).add_(above << LOW_BITS)
    return areas.abs().to(dtype) @ _get_bin_units(areas.device).to(dtype), areas.sign().to(dtype)


def _assign_bins(values: Float[Tensor, "..."]) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
    """The bin of each entry, and one count packed with its distance from the lower edge of the bin."""
    bits = values.float().view(torch.int32).sub(FIRST_BITS).clamp_(0, (BINS << LOW_BITS) - 1)
    return (bits >> LOW_BITS).long(), bits.bitwise_and_((1 << LOW_BITS) - 1).long().add_(COUNT_UNIT)


def _negate(entries: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return entries[0], entries[1].neg_()


@functools.cache
def _get_bin_units(device: torch.device) -> Float[Tensor, " bins"]:
    """The value of one unit in the last place, for each bin."""
    with torch.inference_mode(False):
        power = (torch.arange(BINS, device=device) + (FIRST_BITS >> LOW_BITS)) >> BIN_BITS
        return torch.ldexp(torch.ones(BINS, device=device), power - 127 - 23)
