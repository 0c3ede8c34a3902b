"""`potstill data`: describe a data set, and show which of its tokens are trained on."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.options import CONTEXT
from potstill.stages.options import COLUMNS, DATA, TextOptions


@o.take_options(TextOptions)
def data(
    name: Annotated[str, typer.Argument(metavar="DATA", help=DATA.help)],
    show_tokens: Annotated[
        bool, typer.Option("--show", help="Also show examples, with the trained tokens in color.")
    ] = False,
    tokenizer: Annotated[str, typer.Option(help="A model; potstill reads the data with its tokenizer.")] = "smollm2",
    context: o.Context = CONTEXT.default,
    split: Annotated[str, typer.Option(help="Which part of the data to describe: train, validation or all.")] = "train",
    columns: o.Columns = COLUMNS.default,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Describe a data set, and show which of its tokens potstill trains.

    Example: [bold]potstill data stdlib --show[/]
    """
    from potstill.cli import tables
    from potstill.stages.describe_dataset import describe_dataset

    suppress_library_output()
    text_options = TextOptions(**o.read_options(TextOptions, options))
    description = describe_dataset(name, tokenizer, context=context, split=split, columns=columns, options=text_options)
    return print_or_return(description, as_json, lambda: tables.print_corpus(description, show_tokens=show_tokens))
