"""`potstill frontier`: a chart of everything measured."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return


def frontier(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Folders that potstill finished, or JSON of `measure --out`.")
    ],
    out: Annotated[str, typer.Option(help="The page; a PNG of the same name is written beside it.")] = "frontier.html",
    title: Annotated[str, typer.Option(help="The title of the chart.")] = "Quality against cost",
    as_json: o.Json = False,
) -> Any:
    """Every model on one chart of quality against cost, as one HTML page and a PNG.

    Example: [bold]potstill frontier student --out frontier.html[/]
    """
    from potstill.stages.frontier import draw_frontier

    o.check_output_file(out)
    result = draw_frontier([o.expand_path(folder) for folder in folders], o.expand_path(out), title=title)
    return print_or_return(result, as_json, lambda: print("\n".join(result["files"])))
