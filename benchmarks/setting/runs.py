"""Runs that a benchmark keeps: whether one is finished, and what its card says."""

from pathlib import Path
from typing import Any


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` is trained and measured; one that was stopped before continues with resume."""
    from potstill.core.card import read_card

    return (folder / "card.json").exists() and bool(read_card(folder)["measures"])


def select_measures(measures: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Value and interval of the measures called `names`."""
    return {m["name"]: [m["value"], m.get("low"), m.get("high")] for m in measures if m["name"] in names}


def train_on_text(out: Path, **options: Any) -> None:
    """Trains with cross-entropy alone and saves float32 weights, unless `out` is finished; continues a stopped run."""
    import potstill

    if not is_finished(out):
        potstill.distill(
            objective="cross_entropy",
            weight_decay=0.1,
            save_dtype="float32",
            out=out,
            resume=out.exists(),
            **options,
        )
