"""The main job from end to end: SmolLM2-135M becomes a student of three quarters of its size. Does distillation help?

One table compares four models: the teacher, the teacher with layers removed, that student trained with cross-entropy
alone, and the same student trained with distillation, with equal tokens and seed. If a run was interrupted, run it
again with --resume.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from potstill.cli import tables
from potstill.cli.output import suppress_library_output
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.stages.distill.config import DistillConfig
from potstill.stages.frontier import draw_frontier
from potstill.stages.measure import MeasureConfig
from potstill.stages.prune import PruneConfig
from potstill.stages.sequence import Stage, is_finished, run_stage
from potstill.train.config import TrainConfig

NAMES = ("teacher", "pruned", "cross-entropy", "distilled")


def main() -> None:
    """Creates `--out` with three students, their cards, the measures and the chart."""
    options = parse_arguments()
    suppress_library_output()
    start, out = time.perf_counter(), Path(options.out)
    settings = TrainConfig(tokens=options.tokens, seed=options.seed)
    pruned = out / "pruned"
    stages: dict[Path, Stage] = {
        pruned: PruneConfig(model=options.teacher, keep=options.keep, strategy=options.strategy, data=options.data),
        out / "cross-entropy": build_distill_config(pruned, options, ObjectiveConfig(name=CROSS_ENTROPY), settings),
        out / "distilled": build_distill_config(pruned, options, ObjectiveConfig(), settings),
    }
    for folder, stage in stages.items():
        if not (options.resume and is_finished(folder, stage)):
            run_stage(stage, folder, overwrite=not options.resume, resume=options.resume and folder.exists())
    models = (options.teacher, *(str(folder) for folder in stages))
    measurement = MeasureConfig(
        models=models, teacher=options.teacher, data=options.data, documents=options.documents, context=512
    )
    result = measurement.run()
    names = dict(zip(result["models"], NAMES, strict=True))
    result["models"] = {names[model]: measures for model, measures in result["models"].items()}
    result["paired"] = [
        {**difference, "a": names[difference["a"]], "b": names[difference["b"]]} for difference in result["paired"]
    ]
    result["lineage"] = {"pruned": "teacher", "cross-entropy": "pruned", "distilled": "pruned"}
    (out / "measures.json").write_text(json.dumps(result, indent=2))
    draw_frontier([out / "measures.json"], out / "frontier.html", title="SmolLM2-135M and its students")
    tables.print_measures(result["models"], result["paired"])
    report(result["models"], (time.perf_counter() - start) / 60)


def build_distill_config(
    pruned: Path, options: argparse.Namespace, objective: ObjectiveConfig, settings: TrainConfig
) -> DistillConfig:
    """The pruned model, trained under `objective`; everything else is equal."""
    return DistillConfig(
        teacher=options.teacher, student=str(pruned), data=options.data, objective=objective, settings=settings
    )


def report(models: dict[str, list[dict[str, Any]]], minutes: float) -> None:
    """Prints how much of the pruning's damage each training repaired."""
    bits = {
        name: next(m["value"] for m in measures if m["name"] == "bits_per_byte") for name, measures in models.items()
    }
    damage = bits["pruned"] - bits["teacher"]
    for name in ("cross-entropy", "distilled") if damage else ():
        tables.console.print(f"{name}: {(bits['pruned'] - bits[name]) / damage:.0%} of the pruning's damage repaired")
    tables.console.print(f"{minutes:.1f} minutes in total")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/demo")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
