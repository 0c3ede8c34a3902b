"""`potstill frontier`: draw a chart of all measured models."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return


def frontier(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Output folders of potstill, or JSON files of `potstill measure --out`."),
    ],
    out: Annotated[
        str, typer.Option(help="The HTML page to write; potstill writes pictures next to it.")
    ] = "frontier.html",
    title: Annotated[str, typer.Option(help="The title of the chart.")] = "Quality against cost",
    as_json: o.Json = False,
) -> Any:
    """Draw measured models on one chart of quality against cost, as an HTML page and as pictures.

    The models must have been measured on the same documents; others are refused.

    Example: [bold]potstill frontier student --out frontier.html[/]
    """
    from potstill.stages.frontier import draw_frontier

    o.check_output_file(out)
    result = draw_frontier([o.expand_path(folder) for folder in folders], o.expand_path(out), title=title)
    return print_or_return(result, as_json, lambda: print("\n".join(result["files"])))
