"""What is examined, the verdict on it, and the plain definition of the loss that everything is compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import Tensor

from potstill.core.errors import PotstillError
from potstill.stages.checks.inputs import CheckInputs

PASS, FAIL, NOTE = "pass", "fail", "note"
REPORT_REMEDY = "report it with the two models' names, and take another pair until it is mended"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One invariant: what it says, what was found, why it matters, and what to do where it fails."""

    name: str
    outcome: str
    found: str
    why: str
    remedy: str = ""

    @classmethod
    def from_result(cls, name: str, passed: bool, *, finding: str, why: str, remedy: str = REPORT_REMEDY) -> "Check":
        """Passed, or failed with what to do."""
        return cls(name=name, outcome=PASS if passed else FAIL, found=finding, why=why, remedy="" if passed else remedy)

    def to_dict(self) -> dict[str, str]:
        """A plain dictionary, for cards and JSON."""
        return {name: value for name, value in asdict(self).items() if value}


Invariant = Callable[[CheckInputs], Check | None]
Inputs = TypeVar("Inputs")


def run_checks(inputs: Inputs, checks: Sequence[Callable[[Inputs], Check | None]]) -> Iterator[Check]:
    """What each check that applies finds; one that cannot be asked has failed."""
    for check in checks:
        try:
            result = check(inputs)
        except PotstillError as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            result = Check(name=name, outcome=FAIL, found=str(error), why="training will ask the same")
        if result is not None:
            yield result


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value: a small divergence is as uncertain as a large one."""
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-9))


def format_values(values: Tensor) -> str:
    """Values for people."""
    return " and ".join(f"{value:.4g}" for value in values.tolist())
