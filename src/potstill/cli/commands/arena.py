"""`potstill arena`: compare objectives under equal conditions."""

import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.errors import UsageError

DURATION_PATTERN = re.compile(
    r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)"
)  # small letters: 10m is ten minutes, 10M ten million tokens
SECONDS_PER_UNIT = {"s": 1, "m": 60, "h": 3600}


def arena(
    ctx: o.CommandContext,
    out: o.Out,
    objectives: Annotated[
        str,
        typer.Option(
            help="Arms, with commas between them: objectives of `distill`, and after an @ what an arm sets for itself "
            "(cross_entropy, temperature, lr, on_policy, rollout), as in jsd:beta=0.3@lr=1e-4."
        ),
    ] = "cross_entropy,forward_kl",
    budget: Annotated[
        str, typer.Option(help="For each training: tokens (200k, 2M) or time (90s, 10m, 1h; m is minutes).")
    ] = "200k",
    seeds: Annotated[str, typer.Option(help="How many, from --seed on; or which, as in 1,5,9.")] = "3",
    teacher: o.Teacher = None,
    student: Annotated[str | None, typer.Option(help="The student that every arm starts from.")] = None,
    keep: o.Keep = None,
    params: o.Params = None,
    strategy: o.Strategy = "auto",
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    eval_data: o.EvalData = None,
    cross_entropy: o.CrossEntropy = 0.7,
    temperature: o.Temperature = 1.0,
    context: o.Context = 512,
    batch_tokens: o.BatchTokens = 2048,
    micro_tokens: o.MicroTokens = 2048,
    lr: o.LearningRate = 5e-4,
    save_every: o.SaveEvery = 0,
    eval_every: o.EvalEvery = 0,
    documents: o.Documents = 100,
    prompts: o.Prompts = 20,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an arena; finished arms stay, and arms or seeds may be added.")
    ] = False,
    dry_run: o.DryRun = False,
    skip_doctor: o.SkipDoctor = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Objectives against each other under equal conditions: one teacher, one student, one text, one budget.

    Example: [bold]potstill arena --teacher smollm2 --keep 0.75 --objectives cross_entropy,forward_kl,jsd --out arena[/]
    """
    from potstill.stages.arena.arena import Arena
    from potstill.stages.arena.arm import split_arms
    from potstill.stages.distill.config import DistillConfig

    suppress_library_output()
    options = {**ctx.params, "params": o.parse_count(params), "objective": "forward_kl", "tokens": None}
    tokens, seconds = parse_budget(budget)
    stage = Arena(
        common=DistillConfig.from_options(options),
        objectives=split_arms(objectives),
        tokens=tokens,
        seconds=seconds,
        seeds=parse_seeds(seeds, seed),
        prompts=prompts,
    )
    if dry_run:
        arena_plan = stage.estimate()
        return print_or_return(arena_plan, as_json, lambda: print_arena_plan(arena_plan))
    report = stage.run(o.expand_path(out), overwrite=overwrite, resume=resume, show=sys.stderr.isatty())
    return print_or_return({"out": out, **report}, as_json, lambda: print_arena_report(report, out))


def parse_budget(text: str) -> tuple[int | None, float | None]:
    """(tokens, None) or (None, seconds): `200k` and `10M` are tokens, `90s`, `10m` and `1h` times.

    Raises: UsageError.
    """
    if match := DURATION_PATTERN.fullmatch(text.strip()):
        return None, float(match[1]) * SECONDS_PER_UNIT[match[2][0]]
    try:
        return o.parse_count(text), None
    except UsageError as error:
        raise UsageError(
            f"--budget {text!r} is none; write tokens (200k, 10M for ten million) or a time (90s, 10m for ten minutes)"
        ) from error


def parse_seeds(text: str, first_seed: int) -> tuple[int, ...]:
    """`3` as the three seeds from `first` on, `1,5,9` as these.

    Raises: UsageError.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--seeds {text!r} is neither a number of seeds, such as 3, nor a list of them, such as 1,5,9")
    return tuple(map(int, parts)) if len(parts) > 1 else tuple(range(first_seed, first_seed + int(parts[0])))


def print_arena_plan(arena_plan: Mapping[str, Any]) -> None:
    """What would be trained, arm by arm, and about how long that takes."""
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
    tables.print_line("seconds or tokens are those of a rough plan, without a step run, and without the measuring")


def print_arena_report(report: Mapping[str, Any], out: str) -> None:
    """The arms in a table, who is better than whom in another, and where it all lies."""
    from potstill.cli import tables
    from potstill.stages.arena.report import VERDICT_RULE, make_comparison_table, make_ranking_table

    for rows in filter(None, (make_ranking_table(report), make_comparison_table(report))):
        tables.print_table(rows, *rows[0])
    tables.print_line(VERDICT_RULE)
    tables.print_line(f"{out} holds arena.json, README.md, arena.png and a folder for every student")
