"""The data of an alignment as its run needs them, whatever its objective reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from potstill.core.measure import Measure
from potstill.train.training_module import TrainingModule


@runtime_checkable
class Evaluator(Protocol):
    """Measures a policy on held-out data, with the objective and the frozen networks of its module."""

    @property
    def subject(self) -> str: ...
    def measure(self, module: TrainingModule) -> list[Measure]: ...


@dataclass(frozen=True, kw_only=True)
class AlignData:
    """Packs to train on and to evaluate on, a digest of both, the facts for the card, and what measures the policy.

    `run_facts` are what else a resumed run has to agree on.
    """

    packs: Any
    validation_packs: Any
    digest: str
    facts: Mapping[str, Any]
    evaluator: Evaluator
    run_facts: Mapping[str, Any] = field(default_factory=dict)
