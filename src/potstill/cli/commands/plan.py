"""`potstill plan`: memory, time and disk of a run, before it starts."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import print_facts
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.errors import ArtifactError, NotFound
from potstill.stages.options import LOCAL_TEACHER_HELP, PlanOptions

GIB = 2**30

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headers and rows


NOT_PLANNED = (  # options of a distillation that change none of the plan's numbers
    *("top_k", "rollout", "lr", "warmup", "weight_decay", "patience", "report_to"),
    *("documents", "eval_data", "eval_every", "draft_vocabulary", "skip_doctor", "shard"),
)


@o.take_options(PlanOptions, leave_out=NOT_PLANNED, help_texts={"teacher": LOCAL_TEACHER_HELP})
def plan(
    ctx: o.CommandContext,
    out: Annotated[
        str, typer.Option(help="The folder that the run would write; the plan reads the free disk space there.")
    ] = ".",
    calibration: Annotated[
        str | None,
        typer.Option(help="Output of an earlier `potstill plan --json`: take its rates instead of measuring."),
    ] = None,
    config: o.Config = None,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Estimate the memory, disk and time of a distillation, and suggest changes if it does not fit this machine.

    Example: [bold]potstill plan --teacher smollm2 --keep 0.75 --data stdlib --tokens 2M[/]

    An alignment: [bold]potstill plan --student smollm2 --objective dpo --data preferences.jsonl[/]
    """
    from potstill.stages.align.doctor import is_alignment
    from potstill.stages.align.plan import plan_alignment
    from potstill.stages.distill.config import DistillConfig
    from potstill.stages.plan.plan import Plan
    from potstill.train.config import TrainConfig

    suppress_library_output()
    merged_options = o.merge_options(ctx, config, o.get_number_types(TrainConfig))
    if is_alignment(merged_options):
        given = {name: merged_options[name] for name in o.list_given(ctx, config) if name in merged_options}
        report = plan_alignment(given, o.expand_path(out), measure=merged_options["measure"])
        return print_or_return(report, as_json, lambda: print_facts(report))
    rates = None if calibration is None else read_calibration(calibration)
    stage = Plan(
        distill=DistillConfig.from_options(merged_options), calibration=rates, **o.read_options(PlanOptions, options)
    )
    report = stage.run(o.expand_path(out))
    return print_or_return(report, as_json, lambda: print_plan(report))


def read_calibration(name: str) -> Any:
    """The calibration in a file that `potstill plan --json` printed.

    Raises: NotFound, ArtifactError.
    """
    from potstill.stages.resources.calibration import Calibration

    file = o.expand_path(name)
    if not file.is_file():
        raise NotFound(f"there is no file {name}; write it with potstill plan --json")
    try:
        return Calibration.from_dict(json.loads(file.read_text(encoding="utf-8"))["calibration"])
    except (ValueError, KeyError, TypeError) as error:
        raise (
            error
            if isinstance(error, ArtifactError)
            else ArtifactError(f"{name} has no calibration ({error}); write it with potstill plan --json")
        ) from error


def print_plan(report: Mapping[str, Any]) -> None:
    """Print the plan: options, parameters, costs, whether the run fits, suggestions, and the law of the capacity
    gap."""
    from potstill.cli.tables import print_facts, print_line, print_rows

    print_facts({"stage": report["stage"]})
    for headers, rows in (_make_parameter_table(report), *_make_cost_tables(report)):
        print_rows(headers, rows)
    for line in summarize_plan(report):
        print_line(line)
    if not all(report["fits"].values()):
        print_rows(*_make_suggestion_table(report))


def summarize_plan(report: Mapping[str, Any]) -> list[str]:
    """The plan as sentences: time, memory, disk, and the sizes that suit teacher and student."""
    time, memory, disk, room, gap = (report[name] for name in ("time", "memory", "disk", "room", "capacity_gap"))
    free_memory = "unknown" if room["memory"] is None else f"{room['memory'] / GIB:.1f}"
    fits = {name: "" if is_enough else ", too little" for name, is_enough in report["fits"].items()}
    teacher = gap["teacher_for_student"]
    best_teacher = "no teacher" if teacher is None else f"a teacher of {teacher / 1e6:,.1f}M"
    alignment = report["alignment"]
    phase = max(report["phases"], key=report["phases"].__getitem__)
    return [
        f"time: {time['steps']:,} steps of {time['seconds_per_step']:.2f} s, {time['seconds'] / 60:.1f} min in all, "
        f"{time['tokens_per_second']:,.0f} tokens/s",
        f"memory: {memory['peak'] / GIB:.2f} GiB at most (while {phase}), of {free_memory} GiB free{fits['memory']}",
        f"disk: {disk['most'] / GIB:.2f} GiB at most, {disk['final'] / GIB:.2f} GiB at the end, of "
        f"{room['disk'] / GIB:.1f} GiB free{fits['disk']}",
        f"states while decoding: {_describe_states(report['state_bytes'])}",
        f"law of capacity gap: {best_teacher} suits this student, and a student of "
        f"{gap['student_for_teacher'] / 1e6:,.1f}M "
        f"this teacher ({gap['range']})",
        *([] if alignment is None else [_describe_alignment(alignment)]),
        *report["notes"],
    ]


def _describe_states(states: Mapping[str, Mapping[str, int]]) -> str:
    student, teacher = states["student"], states["teacher"]
    return (
        f"{student['context'] / 2**20:,.1f} MiB for the student's whole context, {student['token']:,} bytes a token "
        f"(teacher: {teacher['context'] / 2**20:,.1f} MiB, {teacher['token']:,} bytes)"
    )


def _describe_alignment(alignment: Mapping[str, float]) -> str:
    return (
        f"two tokenizers: {alignment['teacher_tokens']:.2f} tokens of the teacher's for one of the student's, "
        f"{alignment['aligned_share']:.1%} of the trained tokens aligned"
    )


def _make_parameter_table(report: Mapping[str, Any]) -> Table:
    sizes = report["parameters"]
    parts = ("blocks", "embeddings", "total")
    rows = [(name, *(f"{sizes[name][part]:,}" for part in parts)) for name in ("teacher", "student")]
    if objective_size := sizes["objective"]:
        rows.append(("objective", "", "", f"{objective_size:,}"))
    return ("parameters", *parts), rows


def _make_cost_tables(report: Mapping[str, Any]) -> tuple[Table, Table]:
    """Operations and seconds by part of a step, and memory by its own parts."""
    flops, seconds = report["flops_per_token"], report["time"]["parts"]
    time_rows = [(name, f"{flops.get(name, 0) / 1e6:,.0f}", f"{duration:.3f}") for name, duration in seconds.items()]
    memory_rows = [(name, f"{size / 2**20:,.0f}") for name, size in report["memory"].items()]
    return (("part of a step", "MFLOP a token", "seconds"), time_rows), (("part of memory", "MiB"), memory_rows)


def _make_suggestion_table(report: Mapping[str, Any]) -> Table:
    rows = [
        (
            suggestion["change"],
            f"{suggestion['memory'] / GIB:.2f}",
            f"{suggestion['disk'] / GIB:.2f}",
            f"{suggestion['seconds'] / 60:.1f}",
            "yes" if suggestion["fits"] else "no",
        )
        for suggestion in report["suggestions"]
    ]
    return ("what helps", "memory GiB", "disk GiB", "minutes", "fits"), rows
