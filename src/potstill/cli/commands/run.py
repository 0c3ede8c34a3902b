"""`potstill run`: run the recipe of a published method."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.recipes.options import RecipeOptions

Preferences = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Preferences for minichat, which then ends in DPO.")
]
Questions = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Questions for m-thinker, beside the --data it begins with.")
]


@o.take_options(RecipeOptions)
def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="The name of a recipe; `potstill recipes` lists them.")
    ],
    out: o.Out,
    tiny: Annotated[bool, typer.Option("--tiny", help="Run the same method on a tiny budget, to try it.")] = False,
    data: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="The data, instead of the recipe's; repeat for several.")
    ] = None,
    preferences: Preferences = None,
    questions: Questions = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Run the recipe of a published method, stage by stage, such as minima or gkd.

    Example: [bold]potstill run minima --tiny --out minima[/]

    Example: [bold]potstill run phoenix --data instructions.jsonl --data conversations.jsonl --out chat[/]

    Example: [bold]potstill run minichat --data chats.jsonl --preferences pairs.jsonl --out chat[/]
    """
    from potstill.cli import tables
    from potstill.recipes import registry
    from potstill.stages.sequence import run_stages

    suppress_library_output()
    sources = {"data": data, "preferences": preferences, "questions": questions}
    data_sets = {name: tuple(s) if s and len(s) > 1 else next(iter(s or ()), None) for name, s in sources.items()}
    values = {**data_sets, **o.read_options(RecipeOptions, options)}
    selected_recipe = registry.get_recipe(recipe, tiny=tiny).override(**values)
    if dry_run:
        report, given = selected_recipe.to_dict(), {"recipe": recipe, "tiny": tiny, **data_sets, **options}
        return show_dry_run("run", report, given, out=out, as_json=as_json, print_report=tables.print_facts)
    result = run_stages(selected_recipe.stages, o.expand_path(out), overwrite=overwrite, resume=resume)
    return print_or_return(result.to_dict(), as_json, lambda: tables.print_run(result.out, result.measures))
