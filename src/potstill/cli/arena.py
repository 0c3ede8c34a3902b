"""What lets objectives compete: arena."""

import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.verb import answer, hush
from potstill.core.errors import UsageError

TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)")  # small letters: 10m is ten minutes, 10M ten million tokens
SECONDS = {"s": 1, "m": 60, "h": 3600}


def arena(
    context_of_call: o.Call,
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
    from potstill.pipeline.arena import Arena
    from potstill.pipeline.arm import split
    from potstill.pipeline.distill import Distill

    hush()
    options = {**context_of_call.params, "params": o.count(params), "objective": "forward_kl", "tokens": None}
    tokens, seconds = budget_of(budget)
    stage = Arena(
        common=Distill.from_options(options),
        objectives=split(objectives),
        tokens=tokens,
        seconds=seconds,
        seeds=seeds_of(seeds, seed),
        prompts=prompts,
    )
    if dry_run:
        planned = stage.forecast()
        return answer(planned, as_json, lambda: show_plan(planned))
    found = stage.run(o.path(out), overwrite=overwrite, resume=resume, show=sys.stderr.isatty())
    return answer({"out": out, **found}, as_json, lambda: show_standings(found, out))


def budget_of(text: str) -> tuple[int | None, float | None]:
    """(tokens, None) or (None, seconds): `200k` and `10M` are tokens, `90s`, `10m` and `1h` times.

    Raises: UsageError.
    """
    if hit := TIME.fullmatch(text.strip()):
        return None, float(hit[1]) * SECONDS[hit[2][0]]
    try:
        return o.count(text), None
    except UsageError as error:
        raise UsageError(
            f"--budget {text!r} is none; write tokens (200k, 10M for ten million) or a time (90s, 10m for ten minutes)"
        ) from error


def seeds_of(text: str, first: int) -> tuple[int, ...]:
    """`3` as the three seeds from `first` on, `1,5,9` as these.

    Raises: UsageError.
    """
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(piece.isdecimal() for piece in pieces):
        raise UsageError(f"--seeds {text!r} is neither a number of seeds, such as 3, nor a list of them, such as 1,5,9")
    return tuple(map(int, pieces)) if len(pieces) > 1 else tuple(range(first, first + int(pieces[0])))


def show_plan(planned: Mapping[str, Any]) -> None:
    """What would be trained, arm by arm, and about how long that takes."""
    from potstill.cli import show

    show.facts({key: value for key, value in planned.items() if key != "arms"})
    unknown = "not known"
    rows = [
        {
            "arm": one["arm"],
            "seeds": ", ".join(map(str, one["seeds"])),
            "tokens each": unknown if one["tokens"] is None else f"{one['tokens']:,}",
            "seconds each": unknown if one["seconds"] is None else f"{one['seconds']:,.0f}",
        }
        for one in planned["arms"]
    ]
    show.table(rows, *rows[0])
    show.said("seconds or tokens are those of a rough plan, without a step run, and without the measuring")


def show_standings(found: Mapping[str, Any], out: str) -> None:
    """The arms in a table, who is better than whom in another, and where it all lies."""
    from potstill.cli import show
    from potstill.pipeline.standings import RULE, differences, ranking

    for rows in filter(None, (ranking(found), differences(found))):
        show.table(rows, *rows[0])
    show.said(RULE)
    show.said(f"{out} holds arena.json, README.md, arena.png and a folder for every student")
