"""The progress of training as text: what a terminal's line holds, and the plain lines of a file.

The step, the time left and the speed have fixed widths, so that nothing jumps. Then come the terms of the loss, as many
as fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from potstill.core.metrics_log import is_loss

BAR_WIDTH = 20
GAP = "  "
LINES_PER_RUN = 20  # off a terminal


@dataclass(frozen=True)
class TrainingProgress:
    """How far a run is: steps, seconds left (None before the first step), tokens/s, and the last value of each term."""

    step: int
    total: int
    seconds_left: float | None = None
    tokens_per_second: float = 0.0
    terms: Mapping[str, float] = field(default_factory=dict)

    @property
    def head(self) -> str:
        """The step, the time left and the speed, always as wide as this."""
        width = len(f"{self.total:,}")
        time_left = "-:--" if self.seconds_left is None else format_duration(self.seconds_left)
        speed = f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else "-"
        return f"{self.step:>{width},}/{self.total:,}{GAP}ETA {time_left:>7}{GAP}{speed:>7} tok/s"

    def make_terminal_text(self, width: int) -> str:
        """What stands to the right of the bar: the head, and the terms that fit into `width`."""
        text = self.head
        for name, value in self.terms.items():
            term = f"{GAP}{format_name(name)} {value:.3f}"
            if len(text) + len(term) > width:
                break
            text += term
        return text

    def make_line(self) -> str:
        """A plain line with everything."""
        terms = "".join(f"{GAP}{format_name(name)} {value:.4f}" for name, value in self.terms.items())
        return f"step {self.head}{terms}"


def format_name(name: str) -> str:
    """The name of a term; `eval_loss` is the held-out loss."""
    return f"held-out {name.removeprefix('eval_')}" if name.startswith("eval_") else name


def format_duration(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`; from 100 hours on, days: `5d 03h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def select_terms(logs: Mapping[str, object]) -> dict[str, float]:
    """The terms of the loss in a log of the trainer, the loss itself first; no bookkeeping."""
    terms = {name: float(value) for name, value in logs.items() if isinstance(value, int | float) and is_loss(name)}
    return dict(sorted(terms.items(), key=lambda item: item[0] not in ("loss", "eval_loss")))


def compute_line_interval(total: int) -> int:
    """The steps between two plain lines."""
    return max(1, total // LINES_PER_RUN)
