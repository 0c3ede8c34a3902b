"""`potstill doctor`: check a teacher, a student and a data set before training."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import CommandResult, print_or_return, suppress_library_output


def doctor(
    teacher: o.Teacher = None,
    student: Annotated[str | None, typer.Option(help="The student; without one, the teacher by itself.")] = None,
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    teacher_cache: Annotated[str | None, typer.Option(help="A cache to compare with the live teacher.")] = None,
    objective: o.Objective = "forward_kl",
    cross_entropy: o.CrossEntropy = 0.7,
    temperature: o.Temperature = 1.0,
    context: o.Context = 512,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Is the loss right for this teacher, this student and this text? The invariants, on your own pair.

    The exit code is 1 if one of them fails.

    Example: [bold]potstill doctor --teacher smollm2 --data stdlib[/]
    """
    from potstill.cli import tables
    from potstill.objectives.config import ObjectiveConfig
    from potstill.stages.checks.report import FAIL
    from potstill.stages.doctor import Doctor

    suppress_library_output()
    stage = Doctor(
        teacher=o.get_single_teacher(teacher),
        student=student,
        data=data,
        columns=columns,
        teacher_cache=teacher_cache,
        objective=ObjectiveConfig.parse(objective, cross_entropy=cross_entropy, temperature=temperature),
        context=context,
        seed=seed,
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    checks = stage.run()
    report = {**stage.to_dict(), "checks": [check.to_dict() for check in checks]}
    output = print_or_return(report, as_json, lambda: tables.print_checks(report["checks"]))
    return CommandResult(output, int(any(check.outcome == FAIL for check in checks)))
