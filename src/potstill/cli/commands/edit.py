"""`potstill edit`: change single facts of a model in several languages."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.edit_options import EditOptions

FACTS_HELP = (
    "Facts as a file or folder: rows by language as in BMIKE-53 and MzsRE, or rows with subject, prompt, target and "
    "language. Repeat for several files. docs/edit.md has the columns."
)


@o.take_options(EditOptions, leave_out=EditOptions.unused_options)
def edit(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file, smollm2, or a folder of edits."),
    ],
    facts: Annotated[list[str], typer.Option(help=FACTS_HELP, metavar="TEXT")],
    out: o.Out,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Change single facts of a model in several languages, through the neurons that all languages share.

    The weights stay as they are. The folder holds the edits and names the model. `generate` and `serve` apply an edit
    where a prompt names its subject. The table measures the answers by language, after and before the edits.

    Example: [bold]potstill edit smollm2 --facts facts.jsonl --out edited[/]

    Example: [bold]potstill edit smollm2 --facts zsre_fr.json --facts zsre_pt.json --languages en,fr,pt --out edited[/]
    """
    from potstill.cli import tables
    from potstill.stages.edit import EditConfig

    suppress_library_output()
    sources = facts[0] if len(facts) == 1 else tuple(facts)
    stage = EditConfig(model=model, facts=sources, **o.read_options(EditOptions, options))
    if dry_run:
        from potstill.stages.dry_run_transforms import preview_edit

        report = preview_edit(stage, o.expand_path(out), overwrite=overwrite)
        values = {"model": model, "facts": facts, **options}
        return show_dry_run("edit", report, values, out=out, as_json=as_json)
    result = {"out": out, **stage.run(o.expand_path(out), overwrite=overwrite).to_dict()}
    return print_or_return(result, as_json, lambda: tables.print_edits(result))
