"""`potstill measure`: quality and cost of models, side by side."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output


def measure(
    names: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models to measure side by side.")],
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    teacher: o.ReferenceTeacher = None,
    split: Annotated[
        str, typer.Option(help="validation (5 % of a file, never trained on), train, or all: a file whole.")
    ] = "validation",
    documents: Annotated[int, typer.Option(help="Documents to read.")] = 100,
    context: o.Context = 512,
    prompts: o.Prompts = 20,
    speed: Annotated[bool, typer.Option(help="Measure tokens/s and memory too.")] = True,
    tasks: o.Tasks = None,
    out: Annotated[str | None, typer.Option(help="Also write the measures to this JSON file.")] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Quality and cost of models, side by side, on held-out text.

    Example: [bold]potstill measure smollm2 student --teacher smollm2 --data stdlib[/]
    """
    from potstill.cli import tables
    from potstill.stages.measure import MeasureConfig

    suppress_library_output()
    o.check_output_file(out)
    stage = MeasureConfig(
        models=tuple(names),
        data=data,
        columns=columns,
        split=split,
        teacher=teacher,
        documents=documents,
        context=context,
        prompts=prompts,
        speed=speed,
        tasks=tuple(tasks or ()),
        device=device,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    result = stage.run(None if out is None else o.expand_path(out))
    return print_or_return(result, as_json, lambda: tables.print_measures(result["models"], result["paired"]))
