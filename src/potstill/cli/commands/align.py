"""`potstill align`: train a model with preferences or rewards."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.align.options import AlignOptions

UNUSED = "train_on"  # an option of text: preferences always train their last answer


@o.take_options(AlignOptions, leave_out=(UNUSED,))
def align(
    ctx: o.CommandContext,
    out: o.Out,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model to train: a hub id, a folder, a .gguf file or smollm2; --config may name it.",
        ),
    ] = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Train a model to prefer some answers to others, by preferences or by rewards, and measure it before and after.

    Example: [bold]potstill align smollm2 --data preferences.jsonl --out aligned[/]

    Estimate first: [bold]potstill align smollm2 --data preferences.jsonl --lora 16 --out aligned --dry-run[/]

    Rewards: [bold]potstill align smollm2 --objective grpo --reward accuracy --data sums.jsonl --out solver[/]
    """
    from potstill.cli import tables
    from potstill.stages.align.config import AlignConfig
    from potstill.stages.align.options import AlignTrainConfig
    from potstill.stages.align.run import align as run_align

    suppress_library_output()
    stage = AlignConfig.from_options(o.merge_options(ctx, config, o.get_number_types(AlignTrainConfig)))
    if dry_run:
        from potstill.cli.config_file import flatten_options
        from potstill.stages.align.preview import preview_align

        report = preview_align(stage, o.expand_path(out), overwrite=overwrite, resume=resume)
        values = {name: value for name, value in flatten_options(stage.to_dict()).items() if name != UNUSED}
        return show_dry_run("align", report, values, out=out, as_json=as_json)
    result = run_align(stage, o.expand_path(out), overwrite=overwrite, resume=resume)
    return print_or_return(result.to_dict(), as_json, lambda: tables.print_run(result.out, result.measures))
