"""`potstill models`: list the models that you can use offline."""

from typing import Any

from potstill.cli import options as o
from potstill.cli.output import print_or_return


def models(as_json: o.Json = False) -> Any:
    """List the models that you can use offline; hub ids, folders and GGUF files work as well.

    Example: [bold]potstill models[/]
    """
    from potstill.cli import tables
    from potstill.models.available import list_available_models

    available_models = list_available_models()
    return print_or_return(available_models, as_json, lambda: tables.print_models(available_models))
