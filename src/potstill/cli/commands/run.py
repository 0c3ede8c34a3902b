"""`potstill run`: run the recipe of a published method."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.counts import parse_count
from potstill.core.options import DEVICE, DTYPE, SEED
from potstill.stages.options import DRAFT_VOCABULARY

Preferences = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Preferences for minichat, which then ends in DPO.")
]
Questions = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Questions for m-thinker, beside the --data it begins with.")
]
Judge = Annotated[
    str | None, typer.Option(help="For m-thinker: http://HOST:PORT/v1#MODEL, a model that compares thinking.")
]


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
    data: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="The data, instead of the recipe's; repeat for several.")
    ] = None,
    preferences: Preferences = None,
    questions: Questions = None,
    judge: Judge = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, such as 2M, instead of the recipe's.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the whole text, instead of --tokens.")] = None,
    draft_vocabulary: Annotated[str | None, typer.Option(help=DRAFT_VOCABULARY.help)] = None,
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

    Example: [bold]potstill run phoenix --data instructions.jsonl --data conversations.jsonl --out chat[/]

    Example: [bold]potstill run minichat --data chats.jsonl --preferences pairs.jsonl --out chat[/]
    """
    from potstill.cli import tables
    from potstill.recipes import registry
    from potstill.stages.sequence import run_stages

    suppress_library_output()
    sources = {"data": data, "preferences": preferences, "questions": questions}
    data_sets = {name: tuple(s) if s and len(s) > 1 else next(iter(s or ()), None) for name, s in sources.items()}
    options: dict[str, Any] = {"teacher": teacher, "student": student, **data_sets, "judge": judge, "epochs": epochs}
    options |= {"device": device, "dtype": dtype, "seed": seed}
    counts = {"tokens": tokens, "draft_vocabulary": draft_vocabulary}
    numbers: dict[str, Any] = {name: parse_count(count) for name, count in counts.items()}
    selected_recipe = registry.get_recipe(recipe, tiny=tiny).override(**options, **numbers)
    if dry_run:
        values = {"recipe": recipe, "tiny": tiny, **options, **counts}
        report = selected_recipe.to_dict()
        return show_dry_run("run", report, values, out=out, as_json=as_json, print_report=tables.print_facts)
    result = run_stages(selected_recipe.stages, o.expand_path(out), overwrite=overwrite, resume=resume)
    return print_or_return(result.to_dict(), as_json, lambda: tables.print_run(result.out, result.measures))
