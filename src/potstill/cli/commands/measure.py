"""`potstill measure`: measure the quality and cost of models side by side."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.options import MeasureOptions


@o.take_options(MeasureOptions)
def measure(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models to measure: hub ids, folders, .gguf files or smollm2."),
    ],
    out: Annotated[
        str | None, typer.Option(help="Also write the measures to this JSON file, for `potstill frontier`.")
    ] = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Measure the quality and speed of one or more models on held-out text.

    Each model reads chats in its own chat template; of a chat only the answers and the tokens that end them are scored.
    KL and agreement are measured in the teacher's template. Nothing comes from a model's generation config.

    Example: [bold]potstill measure smollm2 student --teacher smollm2 --data stdlib[/]

    Preferences: [bold]potstill measure smollm2 aligned --reference smollm2 --data preferences.jsonl[/]
    """
    from potstill.cli import tables
    from potstill.stages.measure import MeasureConfig

    suppress_library_output()
    o.check_output_file(out)
    stage = MeasureConfig(models=tuple(models), **o.read_options(MeasureOptions, options))
    if dry_run:
        from potstill.stages.dry_run import preview_measure

        return show_dry_run("measure", preview_measure(stage), {"models": models, **options}, out=out, as_json=as_json)
    result = stage.run(None if out is None else o.expand_path(out))
    return print_or_return(result, as_json, lambda: tables.print_measurement(result))
