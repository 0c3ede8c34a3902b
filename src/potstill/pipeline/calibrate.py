"""How much longer the parts of a step take here than the same parts alone, and what memory a step takes besides.

What the layers and the head take alone is asked of every network anew (`pipeline/probe.py`). `fitted` says how a few
real steps of the one trainer on real packs, clocked from outside, lie beside that; `assume` runs no step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import torch
from torch import nn

from potstill.core.errors import ArtefactError
from potstill.pipeline.probe import Pace, clock
from potstill.pipeline.room import resident
from potstill.pipeline.workload import Workload

BUSY = 1.15  # times as long as alone that parts of a step take, where none was run; ours, of eight runs (docs/plan.md)
LOSS = 2.0  # a loss alone beside a softmax, where no step was run; ours, rough
NEAR = {"alone": 0.5, "cached": 0.75, "live": 1.0}  # losses beside one another, where only some were measured; rough


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The times that the layers of each part take as long as alone, seconds of the rest, and bytes beside the tensors.

    `optimiser` is seconds per trained weight. `loss` holds, by source of the teacher's signals, seconds per row and
    entry of the vocabulary (of both, where they are two) beside the products; it is that of the objective which was
    measured. `beside` is Python, torch, and the allocator's gaps.
    """

    measured: bool
    teacher: float
    student: float
    backward: float
    optimiser: float
    loss: Mapping[str, float] = field(default_factory=dict)
    beside: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Calibration":
        """What `to_dict` gave.

        Raises: ArtefactError.
        """
        names = {one.name for one in fields(cls)}
        if set(found) != names or not isinstance(found["loss"], Mapping) or not found["loss"]:
            raise ArtefactError(f"a calibration holds {', '.join(sorted(names))}; take it from potstill plan --json")
        return cls(**found)

    def seconds(self, work: Workload, pace: Pace) -> dict[str, float]:
        """Seconds of one step by part, of networks that run at this pace."""
        tokens, rows = work.tokens * work.passes, work.rows * work.passes
        alone, beside = layers(work, pace, tokens), once(work, pace)
        head = products(work, pace, rows) + rows * work.entries * self.loss_of(work.source)
        return {
            "teacher forward": alone["teacher"] * self.teacher,
            "student forward": alone["student"] * self.student,
            "backward": alone["backward"] * self.backward + beside["backward"],
            "head and loss": head + beside["loss"],
            "optimiser": work.trained * self.optimiser,
        }

    def loss_of(self, source: str) -> float:
        """The rate of `source`; where only others were measured, a guess from the first of them."""
        if source in self.loss:
            return self.loss[source]
        known, rate = next(iter(self.loss.items()))
        return rate * NEAR[source] / NEAR[known]


@dataclass(frozen=True, kw_only=True)
class Clocked:
    """What some steps took: seconds of a step by part (medians), its tokens and trained rows, and the peak memory."""

    seconds: Mapping[str, float]
    tokens: float
    rows: float
    peak: float

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, float]], *, peak: float) -> "Clocked":
        """The median of several steps, each its seconds by part with `tokens` and `rows`."""
        found = {
            name: median(step.get(name, 0.0) for step in steps) for name in dict.fromkeys(k for s in steps for k in s)
        }
        return cls(seconds=found, tokens=found.pop("tokens"), rows=found.pop("rows"), peak=peak)


def layers(work: Workload, pace: Pace, tokens: float) -> dict[str, float]:
    """Seconds of the layers alone, for so many tokens in passes of the size of `work`'s."""
    flops, size = work.flops(), work.tokens
    return {
        "teacher": flops["teacher forward"] * tokens * pace.teacher.at(size),
        "student": flops["student forward"] * tokens * pace.student.at(size),
        "backward": flops["backward"] * tokens * pace.backward.at(size),
    }


def products(work: Workload, pace: Pace, rows: float) -> float:
    """Seconds of the heads' products alone."""
    return work.flops()["head and loss"] / work.texture.trained * rows * pace.head


def once(work: Workload, pace: Pace) -> dict[str, float]:
    """Seconds of a step that no token and no row changes: what its passes do to whole matrices."""
    forward, backward = pace.table
    return {"loss": work.passes * forward, "backward": work.passes * backward + work.trained * pace.clip}


def fitted(seen: Clocked, work: Workload, pace: Pace, *, held: float) -> Calibration:
    """The calibration that explains what was seen; `held` are the bytes of the step's tensors, as `work` has them."""
    alone, beside, found = layers(work, pace, seen.tokens), once(work, pace), seen.seconds
    loss = found["loss"] - products(work, pace, seen.rows) - beside["loss"]
    return Calibration(
        measured=True,
        teacher=found["teacher"] / alone["teacher"] if "teacher" in found else 1.0,
        student=found["student"] / alone["student"],
        backward=max(0.0, found["backward"] - beside["backward"]) / alone["backward"],
        optimiser=found["optimiser"] / work.trained,
        loss={work.source: max(0.0, loss) / (seen.rows * work.entries)},
        beside=seen.peak - held,
    )


def assume(work: Workload, device: torch.device) -> Calibration:
    """A calibration without a step: layers, a softmax and an optimiser's step, timed alone, and somewhat slower."""
    table = torch.randn(64, min(work.vocabulary, 2**16), device=device)
    softmax = clock(lambda: table.log_softmax(-1), device) / table.numel()
    weights = nn.Parameter(torch.ones(2**20, device=device))
    weights.grad = torch.ones_like(weights)
    optimiser = torch.optim.AdamW([weights], fused=True)
    return Calibration(
        measured=False,
        teacher=BUSY,
        student=BUSY,
        backward=BUSY,
        optimiser=clock(optimiser.step, device) / weights.numel(),
        loss={source: BUSY * LOSS * factor * softmax for source, factor in NEAR.items()},
        beside=float(resident()) if device.type == "cpu" else 0.0,
    )
