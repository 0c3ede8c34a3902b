"""What tells before the start what a run will take: plan."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from potstill.cli import options as o
from potstill.cli.verb import answer, hush
from potstill.core.errors import ArtefactError, NotFound

GIB = 2**30


def plan(
    context_of_call: o.Call,
    teacher: o.Teacher = None,
    student: o.Student = None,
    keep: o.Keep = None,
    params: o.Params = None,
    strategy: o.Strategy = "auto",
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    teacher_cache: Annotated[str | None, typer.Option(help="A cache that `potstill cache` wrote.")] = None,
    objective: o.Objective = "forward_kl",
    cross_entropy: o.CrossEntropy = 0.7,
    temperature: o.Temperature = 1.0,
    tokens: o.Tokens = "200k",
    context: o.Context = 512,
    batch_tokens: o.BatchTokens = 2048,
    micro_tokens: o.MicroTokens = 2048,
    checkpoint_activations: o.CheckpointActivations = False,
    compile: o.Compile = False,
    save_every: o.SaveEvery = 0,
    lora: Annotated[int, typer.Option(help="Rank of a LoRA adapter trained instead of all weights; 0 is none.")] = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    out: Annotated[str, typer.Option(help="Where the run would write: its disk is the one looked at.")] = ".",
    measure: Annotated[
        bool, typer.Option(help="Run a few steps, in memory alone; without, times are rougher and come at once.")
    ] = True,
    calibration: Annotated[
        str | None,
        typer.Option(help="What an earlier `potstill plan --json` printed; its rates are used, no step run."),
    ] = None,
    config: o.Config = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """What a distillation will take: parameters, operations, memory, disk and time, and what to change.

    Example: [bold]potstill plan --teacher smollm2 --keep 0.75 --data stdlib --tokens 2M[/]
    """
    from potstill.pipeline.distill import Distill
    from potstill.pipeline.plan import Plan
    from potstill.train.settings import Settings

    hush()
    options = o.merge(context_of_call, config, o.types(Settings))
    rates = None if calibration is None else read_calibration(calibration)
    made = Plan(distill=Distill.from_options(options), measure=measure, calibration=rates).run(o.path(out))
    return answer(made, as_json, lambda: show(made))


def read_calibration(name: str) -> Any:
    """The calibration in what `potstill plan --json` printed.

    Raises: NotFound, ArtefactError.
    """
    from potstill.pipeline.calibrate import Calibration

    file = o.path(name)
    if not file.is_file():
        raise NotFound(f"there is no file {name}; make it with potstill plan --json")
    try:
        return Calibration.from_dict(json.loads(file.read_text(encoding="utf-8"))["calibration"])
    except (ValueError, KeyError, TypeError) as error:
        raise (
            error
            if isinstance(error, ArtefactError)
            else ArtefactError(f"{name} holds no calibration ({error}); make it with potstill plan --json")
        ) from error


def show(made: Mapping[str, Any]) -> None:
    """The plan for people: what, how much, whether it fits, what to change, what the law of capacity gap says."""
    from potstill.cli.show import console, facts, said

    facts({"stage": made["stage"]})
    console.print(_sizes(made))
    console.print(_parts(made))
    for line in summary(made):
        said(line)
    if not all(made["fits"].values()):
        console.print(_changes(made))


def summary(made: Mapping[str, Any]) -> list[str]:
    """The plan in a few sentences."""
    time, memory, disk, room, gap = (made[name] for name in ("time", "memory", "disk", "room", "capacity_gap"))
    free = "unknown" if room["memory"] is None else f"{room['memory'] / GIB:.1f}"
    fits = {name: "" if enough else ", too little" for name, enough in made["fits"].items()}
    teacher = gap["teacher_for_student"]
    best = "no teacher" if teacher is None else f"a teacher of {teacher / 1e6:,.1f}M"
    apart = made["alignment"]
    phase = max(made["phases"], key=made["phases"].__getitem__)
    return [
        f"time: {time['steps']:,} steps of {time['seconds_per_step']:.2f} s, {time['seconds'] / 60:.1f} min in all, "
        f"{time['tokens_per_second']:,.0f} tokens/s",
        f"memory: {memory['peak'] / GIB:.2f} GiB at most (while {phase}), of {free} GiB free{fits['memory']}",
        f"disk: {disk['most'] / GIB:.2f} GiB at most, {disk['final'] / GIB:.2f} GiB at the end, of "
        f"{room['disk'] / GIB:.1f} GiB free{fits['disk']}",
        f"law of capacity gap: {best} suits this student, and a student of {gap['student_for_teacher'] / 1e6:,.1f}M "
        f"this teacher ({gap['range']})",
        *([] if apart is None else [_apart(apart)]),
        *made["notes"],
    ]


def _apart(found: Mapping[str, float]) -> str:
    return (
        f"two tokenizers: {found['teacher_tokens']:.2f} tokens of the teacher's for one of the student's, "
        f"{found['aligned_share']:.1%} of the trained tokens aligned"
    )


def _sizes(made: Mapping[str, Any]) -> Table:
    drawn = Table("parameters", "blocks", "embeddings", "total")
    for name in ("teacher", "student"):
        size = made["parameters"][name]
        drawn.add_row(name, *(f"{size[part]:,}" for part in ("blocks", "embeddings", "total")))
    if own := made["parameters"]["objective"]:
        drawn.add_row("objective", "", "", f"{own:,}")
    return drawn


def _parts(made: Mapping[str, Any]) -> Table:
    """Operations, seconds and memory by part, each column its own list of parts."""
    flops, seconds = made["flops_per_token"], made["time"]["parts"]
    drawn = Table("part of a step", "MFLOP a token", "seconds", "part of memory", "MiB")
    work = [(name, f"{flops.get(name, 0) / 1e6:,.0f}", f"{spent:.3f}") for name, spent in seconds.items()]
    held = [(name, f"{size / 2**20:,.0f}") for name, size in made["memory"].items()]
    blank = ("",) * 3
    for place in range(max(len(work), len(held))):
        left = work[place] if place < len(work) else blank
        drawn.add_row(*left, *(held[place] if place < len(held) else blank[:2]))
    return drawn


def _changes(made: Mapping[str, Any]) -> Table:
    drawn = Table("what helps", "memory GiB", "disk GiB", "minutes", "fits")
    for one in made["suggestions"]:
        numbers = (f"{one['memory'] / GIB:.2f}", f"{one['disk'] / GIB:.2f}", f"{one['seconds'] / 60:.1f}")
        drawn.add_row(Text(one["change"]), *numbers, "yes" if one["fits"] else "no")
    return drawn
