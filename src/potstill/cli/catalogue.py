"""What there is: models, data."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.verb import answer, hush


def models(as_json: o.Json = False) -> Any:
    """What can be used offline here; hub ids, folders and GGUF files work everywhere.

    Example: [bold]potstill models[/]
    """
    from potstill.cli import show
    from potstill.models.available import available

    found = available()
    return answer(found, as_json, lambda: show.models(found))


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
    from potstill.cli import show
    from potstill.pipeline.texts import described

    hush()
    found = described(name, tokenizer, context=context, split=split, columns=columns)
    return answer(found, as_json, lambda: show.corpus(found, tokens=show_tokens))
