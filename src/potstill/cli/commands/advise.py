"""`potstill advise`: whether speculative decoding pays, with which draft and length."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.options import AdviseOptions


@o.take_options(AdviseOptions, leave_out=("train_on",))
def advise(
    model: o.Model,
    data: Annotated[
        list[str], typer.Option(metavar="TEXT", help="The prompts: a file, a folder, or a hub data set id.")
    ],
    out: Annotated[str | None, typer.Option(help="Also write advice.json and a chart to this folder.")] = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Tell whether speculative decoding pays here, with which draft, and how long it should be.

    The model answers your prompts, since acceptance depends on the text. The command predicts the speed-up of every
    draft and length from acceptance and costs, then measures it. The advice is "do not speculate" where no setting is
    3 % faster than plain decoding.

    Example: [bold]potstill advise smollm2 --data pairs.jsonl[/]

    Example: [bold]potstill advise smollm2 --data pairs.jsonl --draft lookup --draft exit:8 --draft-length 1,2,4[/]
    """
    from potstill.cli import tables
    from potstill.stages.advise import AdviseConfig

    suppress_library_output()
    sources = data[0] if len(data) == 1 else tuple(data)
    stage = AdviseConfig(model=model, data=sources, **o.read_options(AdviseOptions, options))
    if dry_run:
        from potstill.stages.dry_run import preview_advise

        report = preview_advise(stage, None if out is None else o.expand_path(out), overwrite=overwrite)
        return show_dry_run("advise", report, {"model": model, "data": data, **options}, out=out, as_json=as_json)
    result = stage.run(None if out is None else o.expand_path(out), overwrite=overwrite)
    return print_or_return(result, as_json, lambda: tables.print_advice(result))
