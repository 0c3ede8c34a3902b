"""The main job from end to end: SmolLM2-135M becomes a student of three quarters of its size. Does distillation help?

One table compares the teacher, the teacher with layers removed, that student trained with cross-entropy alone, and the
same student trained with distillation. The two trainings of a seed see equal tokens in equal order. If a run was
interrupted, run it again with --resume.
"""

import argparse
import json
import time
from collections.abc import Mapping
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

OBJECTIVES = {"cross-entropy": ObjectiveConfig(name=CROSS_ENTROPY), "distilled": ObjectiveConfig(cross_entropy=0.5)}
CALIBRATION_TOKENS = 1024  # on which the harm of each layer is measured
CARD_DOCUMENTS = 5  # of the measures in each student's own card; the table reads more


def main() -> None:
    """Creates `--out` with the students, their cards, the measures and the chart."""
    options = parse_arguments()
    suppress_library_output()
    start, out = time.perf_counter(), Path(options.out)
    stages = build_stages(options, out)
    for name, stage in stages.items():
        folder = out / name
        if not (options.resume and is_finished(folder, stage)):
            run_stage(stage, folder, overwrite=not options.resume, resume=options.resume and folder.exists())
    result = measure(options, {options.teacher: "teacher", **{str(out / name): name for name in stages}})
    (out / "measures.json").write_text(json.dumps(result, indent=2))
    draw_frontier([out / "measures.json"], out / "frontier.html", title="SmolLM2-135M and its students")
    report(result, list_pairs(options.seeds))
    tables.print_line(f"{(time.perf_counter() - start) / 60:.1f} minutes in total")


def build_stages(options: argparse.Namespace, out: Path) -> dict[str, Stage]:
    """The stages by the name of their folder: one pruned model, and two trained students for each seed."""
    pruned = PruneConfig(
        model=options.teacher,
        keep=options.keep,
        strategy=options.strategy,
        data=options.data,
        calibration_tokens=CALIBRATION_TOKENS,
    )
    stages: dict[str, Stage] = {"pruned": pruned}
    for seed, names in zip(options.seeds, list_pairs(options.seeds), strict=True):
        for name, objective in zip(names, OBJECTIVES.values(), strict=True):
            stages[name] = DistillConfig(
                teacher=options.teacher,
                student=str(out / "pruned"),
                data=options.data,
                objective=objective,
                settings=TrainConfig(tokens=options.tokens, batch_tokens=options.batch_tokens, seed=seed),
                documents=CARD_DOCUMENTS,
            )
    return stages


def list_pairs(seeds: list[int]) -> list[tuple[str, ...]]:
    """The names of the two trained students of each seed, which several seeds number."""
    return [tuple(name if len(seeds) == 1 else f"{name}-{seed}" for name in OBJECTIVES) for seed in seeds]


def measure(options: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """The measures of all models on the same held-out documents, under the names of the table."""
    measurement = MeasureConfig(
        models=tuple(names), teacher=options.teacher, data=options.data, documents=options.documents, context=512
    )
    result = measurement.run()
    result["models"] = {names[model]: measures for model, measures in result["models"].items()}
    result["paired"] = [{**entry, "a": names[entry["a"]], "b": names[entry["b"]]} for entry in result["paired"]]
    result["lineage"] = {
        name: "teacher" if name == "pruned" else "pruned" for name in names.values() if name != "teacher"
    }
    return result


def report(result: Mapping[str, Any], pairs: list[tuple[str, ...]]) -> None:
    """Prints the table, the difference of the two trainings of each seed, and the damage that each repaired."""
    tables.print_measures(result["models"], [entry for entry in result["paired"] if (entry["a"], entry["b"]) in pairs])
    bits = {
        name: next(m["value"] for m in measures if m["name"] == "bits_per_byte")
        for name, measures in result["models"].items()
    }
    damage = bits["pruned"] - bits["teacher"]
    for name in (name for names in pairs for name in names if damage):
        tables.print_line(f"{name}: {(bits['pruned'] - bits[name]) / damage:.0%} of the pruning's damage repaired")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out/demo")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="docstrings")
    parser.add_argument("--keep", type=float, default=0.75)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
