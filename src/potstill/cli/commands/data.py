"""`potstill data`: what a data set is, and which of its tokens are trained."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output


def data(
    name: Annotated[str, typer.Argument(metavar="DATA", help="stdlib, a file, a folder, or a hub data set id.")],
    show_tokens: Annotated[bool, typer.Option("--show", help="Show which tokens are trained, coloured.")] = False,
    tokenizer: Annotated[str, typer.Option(help="The model whose tokenizer reads the text.")] = "smollm2",
    context: o.Context = 512,
    split: Annotated[str, typer.Option(help="train, validation or all.")] = "train",
    columns: o.Columns = "",
    as_json: o.Json = False,
) -> Any:
    """What a data set is, and which of its tokens are trained.

    Example: [bold]potstill data stdlib --show[/]
    """
    from potstill.cli import tables
    from potstill.stages.dataset import describe_dataset

    suppress_library_output()
    description = describe_dataset(name, tokenizer, context=context, split=split, columns=columns)
    return print_or_return(description, as_json, lambda: tables.print_corpus(description, show_tokens=show_tokens))
