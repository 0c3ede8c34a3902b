"""`potstill recipes`: list the published methods that potstill reproduces."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A recipe to show with all its values; by default list all recipes."),
    ] = None,
    cite: Annotated[bool, typer.Option("--cite", help="Print BibTeX entries of the sources instead.")] = False,
    as_json: o.Json = False,
) -> Any:
    """List the recipes: published methods that `potstill run` reproduces.

    Example: [bold]potstill recipes minima --cite[/]
    """
    from potstill.cli import tables
    from potstill.recipes.listing import list_recipe_facts

    if name is None and not cite and not as_json:
        return tables.print_table(list_recipe_facts(), "name", "summary", "source")
    from potstill.recipes import registry

    selected_recipes = [registry.get_recipe(name)] if name else registry.list_recipes()
    result = [recipe.to_dict() for recipe in selected_recipes]
    if cite:
        return print_or_return(
            result, as_json, lambda: print("\n\n".join(dict.fromkeys(recipe.bibtex for recipe in selected_recipes)))
        )
    return print_or_return(result, as_json, lambda: tables.print_recipes(result))
