"""`potstill run`: run a published system's recipe."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `potstill recipes` lists.")],
    out: o.Out,
    tiny: Annotated[bool, typer.Option("--tiny", help="The same method on a tiny budget.")] = False,
    teacher: Annotated[str | None, typer.Option(help="Another teacher than the recipe's.")] = None,
    student: Annotated[
        str | None, typer.Option(help="Another student than the recipe's: a model instead of a share of the teacher.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Other data than the recipe's.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Another budget, such as 2M.")] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> Any:
    """Run a published system's recipe, stage by stage.

    Example: [bold]potstill run minima --tiny --out minima[/]
    """
    from potstill.cli import tables
    from potstill.recipes import registry
    from potstill.stages.sequence import run_stages

    suppress_library_output()
    selected_recipe = registry.get_recipe(recipe, tiny=tiny).override(
        teacher=teacher,
        student=student,
        data=data,
        tokens=o.parse_count(tokens),
        seed=seed,
        device=device,
        dtype=dtype,
    )
    if dry_run:
        return print_or_return(
            selected_recipe.to_dict(), as_json, lambda: tables.print_facts(selected_recipe.to_dict())
        )
    result = run_stages(selected_recipe.stages, o.expand_path(out), overwrite=overwrite, resume=resume)
    return print_or_return(result.to_dict(), as_json, lambda: tables.print_run(result.out, result.measures))
