"""`potstill arena`: compare objectives under equal conditions."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.counts import parse_count
from potstill.core.errors import UsageError
from potstill.stages.options import LOCAL_TEACHER_HELP, ArenaOptions

DURATION_PATTERN = re.compile(
    r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)"
)  # lower case: 10m is ten minutes, 10M ten million tokens
SECONDS_PER_UNIT = {"s": 1, "m": 60, "h": 3600}
BUDGET_HELP = "Budget of each training run: tokens (200k, 2M), time (90s, 10m, 1h; m is minutes) or passes (2epochs)."
EPOCHS_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*epochs?")


NOT_IN_ARENA = (  # options of a distillation that an arena sets itself, or leaves at their defaults
    *("teacher_cache", "top_k", "objective", "on_policy", "rollout", "tokens", "epochs", "warmup", "weight_decay"),
    *("patience", "keep_checkpoints", "report_to", "checkpoint_activations", "compile", "lora", "shard"),
    *("train", "draft_vocabulary"),
)


@o.take_options(
    ArenaOptions,
    leave_out=NOT_IN_ARENA,
    help_texts={"teacher": LOCAL_TEACHER_HELP, "student": "The student that every arm starts from."},
)
def arena(
    out: o.Out,
    objectives: Annotated[
        str,
        typer.Option(
            help="Objectives to compare (the arms), separated by commas. Settings of one arm follow an @: "
            "cross_entropy, temperature, lr, on_policy or rollout, as in jsd:beta=0.3@lr=1e-4."
        ),
    ] = "cross_entropy,forward_kl",
    budget: Annotated[str, typer.Option(help=BUDGET_HELP)] = "200k",
    seeds: Annotated[
        str, typer.Option(help="Number of seeds per arm, counted from --seed, or a list such as 1,5,9.")
    ] = "3",
    overwrite: o.Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted arena, or add arms or seeds to a finished one."),
    ] = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Compare objectives: train the same student with each one, on the same teacher, data and budget.

    Example: [bold]potstill arena --teacher smollm2 --keep 0.75 --objectives cross_entropy,forward_kl,jsd --out arena[/]
    """
    from potstill.stages.arena.arena import Arena
    from potstill.stages.arena.arm import split_arms
    from potstill.stages.distill.config import DistillConfig

    suppress_library_output()
    stage = Arena(
        common=DistillConfig.from_options({**options, "params": parse_count(options["params"])}),
        objectives=split_arms(objectives),
        **parse_budget(budget),
        seeds=parse_seeds(seeds, options["seed"]),
        prompts=options["prompts"],
    )
    if dry_run:
        from potstill.stages.dry_run import preview_arena

        report = preview_arena(stage, o.expand_path(out), overwrite=overwrite, resume=resume)
        values = {"objectives": objectives, "budget": budget, "seeds": seeds, **options}
        return show_dry_run("arena", report, values, out=out, as_json=as_json, print_report=print_arena_plan)
    report = stage.run(o.expand_path(out), overwrite=overwrite, resume=resume)
    return print_or_return({"out": out, **report}, as_json, lambda: print_arena_report(report, out))


def parse_budget(text: str) -> dict[str, Any]:
    """A budget by its unit: `200k` and `10M` as `tokens`; `90s`, `10m` and `1h` as `seconds`; `2epochs` as `epochs`.

    Raises: UsageError if the text is none of them.
    """
    if match := EPOCHS_PATTERN.fullmatch(text.strip()):
        return {"epochs": float(match[1])}
    if match := DURATION_PATTERN.fullmatch(text.strip()):
        return {"seconds": float(match[1]) * SECONDS_PER_UNIT[match[2][0]]}
    try:
        return {"tokens": parse_count(text)}
    except UsageError as error:
        raise UsageError(
            f"--budget {text!r} is not a budget; give tokens (200k, 10M for ten million), a time (90s, 10m for ten "
            f"minutes) or passes over the text (2epochs)"
        ) from error


def parse_seeds(text: str, first_seed: int) -> tuple[int, ...]:
    """`3` as three seeds from `first_seed` on, `1,5,9` as these three.

    Raises: UsageError if the text is neither.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--seeds {text!r} is neither a number of seeds, such as 3, nor a list of them, such as 1,5,9")
    return tuple(map(int, parts)) if len(parts) > 1 else tuple(range(first_seed, first_seed + int(parts[0])))


def print_arena_plan(arena_plan: Mapping[str, Any]) -> None:
    """Print the runs of each arm, and their estimated tokens and seconds."""
    from potstill.cli import tables

    tables.print_facts({key: value for key, value in arena_plan.items() if key != "arms"})
    placeholder = "not known"
    rows = [
        {
            "arm": arm["arm"],
            "seeds": ", ".join(map(str, arm["seeds"])),
            "tokens each": placeholder if arm["tokens"] is None else f"{arm['tokens']:,}",
            "seconds each": placeholder if arm["seconds"] is None else f"{arm['seconds']:,.0f}",
        }
        for arm in arena_plan["arms"]
    ]
    tables.print_table(rows, *rows[0])
    tables.print_line(
        "seconds or tokens are estimates without a measured step; measuring the students takes additional time"
    )


def print_arena_report(report: Mapping[str, Any], out: str) -> None:
    """Print a ranking of the arms, a comparison of every two, and where the files are."""
    from potstill.cli import tables
    from potstill.stages.arena.report import VERDICT_RULE, make_comparison_table, make_ranking_table

    for rows in filter(None, (make_ranking_table(report), make_comparison_table(report))):
        tables.print_table(rows, *rows[0])
    tables.print_line(VERDICT_RULE)
    tables.print_line(f"{out} contains arena.json, README.md, arena.png and a folder for every student")
