"""`potstill doctor`: check a teacher, a student and a data set before training."""

from typing import Any

from potstill.cli import options as o
from potstill.cli.output import CommandResult, print_or_return, suppress_library_output
from potstill.stages.options import DoctorOptions


@o.take_options(DoctorOptions, leave_out=("prompts_per_step",))
def doctor(teacher: o.Teacher = None, as_json: o.Json = False, **options: Any) -> Any:
    """Check that training computes the right loss for your teacher, student and data set.

    The exit code is 1 if a check fails.

    Example: [bold]potstill doctor --teacher smollm2 --data stdlib[/]

    An alignment: [bold]potstill doctor --teacher smollm2 --objective dpo --data preferences.jsonl[/]
    """
    from potstill.cli import tables
    from potstill.objectives.config import ObjectiveConfig
    from potstill.stages.checks.report import FAIL
    from potstill.stages.doctor import Doctor

    suppress_library_output()
    objective = ObjectiveConfig.from_options(options)
    stage = Doctor(teacher=o.get_teachers(teacher), objective=objective, **o.read_options(DoctorOptions, options))
    checks = stage.run()
    report = {**stage.to_dict(), "checks": [check.to_dict() for check in checks]}
    output = print_or_return(report, as_json, lambda: tables.print_checks(report["checks"]))
    return CommandResult(output, int(any(check.outcome == FAIL for check in checks)))
