"""`potstill distill`: train a small student to predict like a large teacher."""

from typing import Any

from potstill.cli import options as o
from potstill.cli.config_file import flatten_options
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.options import DistillOptions


@o.take_options(DistillOptions)
def distill(
    ctx: o.CommandContext,
    out: o.Out,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    config: o.Config = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Train a small student to predict like a large teacher (distillation), and measure both.

    Example: [bold]potstill distill --teacher smollm2 --keep 0.75 --data stdlib --tokens 200k --out student[/]

    Estimate first: [bold]potstill distill --teacher smollm2 --keep 0.75 --epochs 2 --out student --dry-run[/]

    Two teachers: [bold]potstill distill --teacher smollm2 --teacher own=pruned --student pruned --out student[/]
    """
    from potstill.cli import tables
    from potstill.stages.distill.config import DistillConfig
    from potstill.stages.distill.run import distill as run_distill
    from potstill.train.config import TrainConfig

    suppress_library_output()
    stage = DistillConfig.from_options(o.merge_options(ctx, config, o.get_number_types(TrainConfig)))
    if dry_run:
        from potstill.stages.dry_run import preview_distill

        report = preview_distill(stage, o.expand_path(out), overwrite=overwrite, resume=resume)
        return show_dry_run("distill", report, flatten_options(stage.to_dict()), out=out, as_json=as_json)
    result = run_distill(stage, o.expand_path(out), overwrite=overwrite, resume=resume)
    return print_or_return(result.to_dict(), as_json, lambda: tables.print_run(result.out, result.measures))
