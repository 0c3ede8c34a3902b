"""The result of a check, and the function that runs checks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from potstill.core.errors import PotstillError
from potstill.stages.checks.inputs import CheckInputs

PASS, FAIL, NOTE = "pass", "fail", "note"
REPORT_REMEDY = "report it with the names of both models, and use another pair until it is fixed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check: its name, outcome, finding, reason, and the remedy if it failed."""

    name: str
    outcome: str
    found: str
    why: str
    remedy: str = ""

    @classmethod
    def from_result(cls, name: str, passed: bool, *, finding: str, why: str, remedy: str = REPORT_REMEDY) -> "Check":
        """A check that passed, or failed with a remedy."""
        return cls(name=name, outcome=PASS if passed else FAIL, found=finding, why=why, remedy="" if passed else remedy)

    def to_dict(self) -> dict[str, str]:
        """A plain dictionary, for cards and JSON."""
        return {name: value for name, value in asdict(self).items() if value}


Invariant = Callable[[CheckInputs], Check | None]
Inputs = TypeVar("Inputs")


def run_checks(inputs: Inputs, checks: Sequence[Callable[[Inputs], Check | None]]) -> Iterator[Check]:
    """The result of each check that applies; an error in a check counts as a failure."""
    for check in checks:
        try:
            result = check(inputs)
        except PotstillError as error:
            why = "training needs the same models and text, and would stop with the same error"
            result = Check(name=_get_check_name(check), outcome=FAIL, found=str(error), why=why)
        if result is not None:
            yield result


def _get_check_name(check: Callable[..., object]) -> str:
    """The name that a check reports, made from its function's: `check_label_mask` gives "label mask"."""
    name = check.__name__.removeprefix("check_")
    for written, spoken in (("lm_", "LM "), ("one_hot", "one-hot"), ("per_document", "per-document")):
        name = name.replace(written, spoken)
    return name.replace("_", " ")


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest value, since errors of a sum scale with its largest term."""
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-9))


def format_values(values: Tensor) -> str:
    """Values in four digits, joined by "and"."""
    return " and ".join(f"{value:.4g}" for value in values.tolist())


class CheckFailed(PotstillError):
    """A check failed: training would compute a wrong loss without an error."""


def raise_if_failed(checks: Sequence[Check]) -> list[dict[str, str]]:
    """The checks as a card records them.

    Raises: CheckFailed with the first that failed.
    """
    for check in checks:
        if check.outcome == FAIL:
            raise CheckFailed(f"{check.name}: {check.found}; {check.remedy or check.why} (or pass --skip-doctor)")
    return [{"name": check.name, "outcome": f"{check.outcome}: {check.found}"} for check in checks]
