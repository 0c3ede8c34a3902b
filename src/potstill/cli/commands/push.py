"""`potstill push`: upload a model to the hub."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return


def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder that distill or prune wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository on the hub, as OWNER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Create a repository that only you see.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be uploaded, and exit; needs no network.")
    ] = False,
    as_json: o.Json = False,
) -> Any:
    """Upload a finished model with its card to the Hugging Face hub.

    Example: [bold]potstill push student you/student --dry-run[/]
    """
    from potstill.cli import tables
    from potstill.stages.push import push as push_folder

    result = push_folder(o.expand_path(folder), repo, private=private, dry_run=dry_run)
    return print_or_return(result, as_json, lambda: tables.print_push(result))
