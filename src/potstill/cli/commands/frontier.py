"""`potstill frontier`: draw a chart of all measured models."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return


def frontier(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Output folders of potstill, or files of `measure --out`."),
    ],
    out: Annotated[str, typer.Option(help="The HTML page; a PNG of the same name is written too.")] = "frontier.html",
    title: Annotated[str, typer.Option(help="The title of the chart.")] = "Quality against cost",
    as_json: o.Json = False,
) -> Any:
    """Draw all models on one chart of quality against cost, as an HTML page and a PNG.

    Example: [bold]potstill frontier student --out frontier.html[/]
    """
    from potstill.stages.frontier import draw_frontier

    o.check_output_file(out)
    result = draw_frontier([o.expand_path(folder) for folder in folders], o.expand_path(out), title=title)
    return print_or_return(result, as_json, lambda: print("\n".join(result["files"])))
