"""`potstill run`: run the recipe of a published method."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.counts import parse_count
from potstill.core.options import DEVICE, DTYPE, SEED


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="The name of a recipe; `potstill recipes` lists them.")
    ],
    out: o.Out,
    tiny: Annotated[bool, typer.Option("--tiny", help="Run the same method on a tiny budget, to try it.")] = False,
    teacher: Annotated[str | None, typer.Option(help="The teacher, instead of the recipe's.")] = None,
    student: Annotated[
        str | None, typer.Option(help="A model to train, instead of the recipe's pruned teacher.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data, instead of the recipe's.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, such as 2M, instead of the recipe's.")] = None,
    device: o.Device = DEVICE.default,
    dtype: o.Dtype = DTYPE.default,
    seed: o.Seed = SEED.default,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
) -> Any:
    """Run the recipe of a published method, stage by stage, such as minima or gkd.

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
        tokens=parse_count(tokens),
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
