"""`potstill convert`: change what the layers of a model are."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.options import ConvertOptions
from potstill.transforms.convert.listing import list_conversion_names

TO_HELP = (
    f"{', '.join(list_conversion_names())}; with options as NAME:OPTION=VALUE,OPTION=VALUE. "
    "docs/architectures.md lists them."
)


@o.take_options(ConvertOptions)
def convert(
    model: o.Model,
    to: Annotated[str, typer.Option(help=TO_HELP)],
    out: o.Out,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Change what the layers of a model are, starting from its weights; `distill` then heals the result.

    Example: [bold]potstill convert smollm2 --to elastic --out elastic[/]
    """
    from potstill.cli import tables
    from potstill.stages.convert import ConvertConfig

    suppress_library_output()
    stage = ConvertConfig(model=model, to=to, **o.read_options(ConvertOptions, options))
    if dry_run:
        from potstill.stages.dry_run_transforms import preview_convert

        report = preview_convert(stage, o.expand_path(out), overwrite=overwrite)
        return show_dry_run("convert", report, {"model": model, "to": to, **options}, out=out, as_json=as_json)
    card = stage.run(o.expand_path(out), overwrite=overwrite)
    result = {"out": out, **card.to_dict()}
    return print_or_return(result, as_json, lambda: tables.print_converted_model(model, out, card.details))
