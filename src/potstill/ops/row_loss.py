"""Losses of single rows of logits.

A row loss is a callable (student's logits [C V], inputs by name, targets [C]) -> [C] that treats each row separately.
An input is a teacher's logits [C V], partial distributions of a cache, or any other tensor of C rows. Inputs get no
gradient. Sources: the definitions in `ops.divergence`; `WhereArgmaxIs` is the mask of dual-space distillation
(arXiv:2406.17328, arXiv:2504.11426).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution, coarse_divergence, coarse_divergence_with_gradient
from potstill.ops.divergence import (
    Divergence,
    acceptance_nll,
    apply_temperature,
    cross_entropy,
    forward_kl,
    total_variation,
)
from potstill.ops.divergence_gradient import WITH_GRADIENT
from potstill.ops.row_subset import RowSubset
from potstill.ops.softmax import (
    Slope,
    Softmax,
    acceptance_nll_slope,
    coarse_kl_slope,
    cross_entropy_slope,
    differentiate_loss,
    forward_kl_slope,
    get_slope,
    total_variation_slope,
)

RowLoss = Callable[[Tensor, Mapping[str, Any], Tensor], Tensor]

RowInput = Tensor | CoarseDistribution | RowSubset

SLOPES: Mapping[Divergence, Callable[[Tensor, Softmax], Slope]] = {
    forward_kl: forward_kl_slope,
    total_variation: total_variation_slope,
    acceptance_nll: acceptance_nll_slope,
}


@runtime_checkable
class Differentiable(Protocol):
    """A row loss that computes its own derivative."""

    def __call__(self, student: Tensor, frozen: Mapping[str, Any], targets: Tensor) -> Tensor: ...

    def values_and_gradient(self, student: Tensor, frozen: Mapping[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
        """(values [C], derivative of values[c] by student[c] as [C V])."""
        ...


@dataclass(frozen=True)
class CrossEntropyRows:
    """-log q[target]."""

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, RowInput], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        return cross_entropy(student, targets)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, RowInput], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and q - onehot(target)."""
        return differentiate_loss(self, student, frozen, targets)

    def slope(self, student: Softmax, frozen: Mapping[str, RowInput], targets: Int[Tensor, " C"]) -> Slope:
        """Both from a shared softmax."""
        return cross_entropy_slope(student, targets)


@dataclass(frozen=True)
class DivergenceRows:
    """tau^2 D(teacher / tau, student / tau) for the input `teacher`; partial distributions are at tau already.

    Raises: ValueError if the temperature is not positive and finite.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        apply_temperature(self.divergence, self.temperature)

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        teacher: Tensor | CoarseDistribution = frozen[self.teacher]
        tau = self.temperature
        if isinstance(teacher, CoarseDistribution):
            return coarse_divergence(self.divergence, teacher, student / tau) * tau**2
        return apply_temperature(self.divergence, tau)(teacher, student)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and their derivative by the student's logits."""
        teacher: Tensor | CoarseDistribution = frozen[self.teacher]
        tau = self.temperature
        student = student if tau == 1 else student / tau
        if isinstance(teacher, CoarseDistribution):
            values, gradient = coarse_divergence_with_gradient(self._differentiate, teacher, student)
        else:
            values, gradient = self._differentiate(teacher if tau == 1 else teacher / tau, student)
        return (values, gradient) if tau == 1 else (values * tau**2, gradient * tau)

    def slope(self, student: Softmax, frozen: Mapping[str, Any], targets: Int[Tensor, " C"]) -> Slope | None:
        """Both from a shared softmax at temperature 1, for the divergences of `SLOPES`; None for all others."""
        teacher: Tensor | CoarseDistribution = frozen[self.teacher]
        if self.temperature != 1 or self.divergence not in SLOPES:
            return None
        if not isinstance(teacher, CoarseDistribution):
            return SLOPES[self.divergence](teacher, student)
        return coarse_kl_slope(teacher, student) if self.divergence is forward_kl else None

    def _differentiate(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """D at temperature 1 and its derivative by the student's logits."""
        if self.divergence in WITH_GRADIENT:
            return WITH_GRADIENT[self.divergence](teacher, student)
        with torch.enable_grad():
            student = student.detach().requires_grad_()
            values = self.divergence(teacher, student)
            (gradient,) = torch.autograd.grad(values.sum(), student)
        return values.detach(), gradient


@dataclass(frozen=True)
class Weighted:
    """`loss` times the input `weights [C]`, which may be negative.

    A row of weight 0 has no gradient. The weights change summands and never the divisor.
    """

    loss: Differentiable
    weights: str

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, RowInput], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        return self.loss(student, frozen, targets) * self._get_weights(frozen)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, RowInput], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and their derivative by the student's logits."""
        values, gradient = self.loss.values_and_gradient(student, frozen, targets)
        weights = self._get_weights(frozen).to(values.dtype)
        return values * weights, gradient.mul_(weights[:, None])

    def slope(self, student: Softmax, frozen: Mapping[str, RowInput], targets: Int[Tensor, " C"]) -> Slope | None:
        """Both from a shared softmax, if the loss has a slope."""
        slope = get_slope(self.loss, student, frozen, targets)
        return slope and slope.weight_rows(self._get_weights(frozen))

    def _get_weights(self, frozen: Mapping[str, Any]) -> Tensor:
        weights: Tensor = frozen[self.weights]
        return weights


@dataclass(frozen=True)
class AtTemperature:
    """`loss` of the student's logits / `temperature`, as where tokens were drawn at that temperature.

    Unlike a divergence at a temperature it is not multiplied by the square. Log-probabilities / temperature would be no
    distribution.
    """

    loss: RowLoss
    temperature: float

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        return self.loss(student / self.temperature, frozen, targets)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and their derivative by the student's logits; `loss` has to be `Differentiable`."""
        assert isinstance(self.loss, Differentiable), "a loss without a derivative is only measured"
        values, gradient = self.loss.values_and_gradient(student / self.temperature, frozen, targets)
        return values, gradient.div_(self.temperature)


class _MaskedLoss:
    """`loss` at the rows of a mask [C]; 0 and no gradient at all others.

    The mask zeroes summands and never changes the divisor.
    """

    loss: Differentiable

    def get_mask(self, frozen: Mapping[str, Any], targets: Tensor) -> Tensor:
        """True at the rows that count."""
        raise NotImplementedError

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        return torch.where(self.get_mask(frozen, targets), self.loss(student, frozen, targets), 0.0)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and their derivative by the student's logits."""
        values, gradient = self.loss.values_and_gradient(student, frozen, targets)
        mask = self.get_mask(frozen, targets)
        return torch.where(mask, values, 0.0), gradient.masked_fill_(~mask[:, None], 0.0)

    def slope(self, student: Softmax, frozen: Mapping[str, Any], targets: Int[Tensor, " C"]) -> Slope | None:
        """Both from a shared softmax, if the loss has a slope."""
        slope = get_slope(self.loss, student, frozen, targets)
        return slope and slope.weight_rows(self.get_mask(frozen, targets))


@dataclass(frozen=True)
class Masked(_MaskedLoss):
    """`loss` at the rows at which the input `mask` (booleans [C]) is True."""

    loss: Differentiable
    mask: str

    def get_mask(self, frozen: Mapping[str, Any], targets: Tensor) -> Tensor:
        """The input itself."""
        mask: Tensor = frozen[self.mask]
        return mask


@dataclass(frozen=True)
class WhereArgmaxIs(_MaskedLoss):
    """`loss` at the rows where the argmax of the logits `source` is the token `choice`, or the target without `choice`.

    `choice` is the name of token ids [C]; -1 leaves a row out.
    """

    loss: Differentiable
    source: str
    choice: str | None = None

    def get_mask(self, frozen: Mapping[str, Any], targets: Tensor) -> Tensor:
        """Where both agree."""
        mask: Tensor = frozen[self.source].argmax(-1) == (targets if self.choice is None else frozen[self.choice])
        return mask


@dataclass(frozen=True)
class WhereAvailable:
    """`loss` at the rows for which the input `source`, a `RowSubset`, has values; 0 and no gradient at all others.

    It computes only these rows. So several losses of disjoint rows cost as much as one loss of all rows.
    """

    loss: Differentiable
    source: str

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        is_available = frozen[self.source].places >= 0
        values = student.new_zeros(len(student))
        return values.masked_scatter(
            is_available, self.loss(student[is_available], self._select_inputs(student, frozen), targets[is_available])
        )

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and their derivative by the student's logits."""
        is_available = frozen[self.source].places >= 0
        values, gradient = self.loss.values_and_gradient(
            student[is_available], self._select_inputs(student, frozen), targets[is_available]
        )
        outputs = values.new_zeros(len(student)), torch.zeros_like(student)
        for output, part in zip(outputs, (values, gradient), strict=True):
            output[is_available] = part
        return outputs

    def _select_inputs(self, student: Tensor, frozen: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs at the available rows, in the dtype of the student's logits."""
        row_input = frozen[self.source].values
        return {
            **frozen,
            self.source: row_input if isinstance(row_input, CoarseDistribution) else row_input.to(student.dtype),
        }


@dataclass(frozen=True)
class Tangent:
    """value + slope (log q[target] - point): the tangent of a function of the log-likelihoods of several rows.

    One of the rows has the function's value. Each row has the derivative by its own log q[target], at the point
    log q[target]. So value and gradient are those of the function, and its rows may be in different chunks.
    """

    tangent: str  # the input [C 3]: value, slope, point

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        value, slope, point = frozen[self.tangent].unbind(-1)
        return value - slope * (cross_entropy(student, targets) + point)

    def values_and_gradient(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> tuple[Float[Tensor, " C"], Float[Tensor, "C V"]]:
        """The values and slope (onehot(target) - q)."""
        return differentiate_loss(self, student, frozen, targets)

    def slope(self, student: Softmax, frozen: Mapping[str, Any], targets: Int[Tensor, " C"]) -> Slope:
        """Both from a shared softmax."""
        value, slope, point = frozen[self.tangent].to(student.logits.dtype).unbind(-1)
        target_slope = cross_entropy_slope(student, targets)
        return target_slope.weight_rows(-slope)._replace(values=value - slope * (target_slope.values + point))


@dataclass(frozen=True)
class Constants:
    """The input `values [C]` itself, which no gradient reaches: a number that is measured with a loss."""

    values: str

    def __call__(
        self, student: Float[Tensor, "C V"], frozen: Mapping[str, Any], targets: Int[Tensor, " C"]
    ) -> Float[Tensor, " C"]:
        values: Tensor = frozen[self.values]
        return values.to(student.dtype)

    def slope(self, student: Softmax, frozen: Mapping[str, Any], targets: Int[Tensor, " C"]) -> Slope:
        """The values and no derivative."""
        return Slope(self(student.logits, frozen, targets), 0.0, lambda delta, weight: None)
