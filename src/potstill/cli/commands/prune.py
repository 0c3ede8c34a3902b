"""`potstill prune`: prune a model to a number of parameters."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.options import PruneOptions


@o.take_options(PruneOptions)
def prune(
    model: o.Model,
    out: o.Out,
    layers: Annotated[int | None, typer.Option(help="Exact number of layers, instead of --keep.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Exact number of key/value heads per layer.")] = None,
    ffn: Annotated[int | None, typer.Option(help="Exact number of feed-forward neurons per layer.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Exact hidden size (model width).")] = None,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Prune a model to a number of parameters, then reload it and check that its logits are the same.

    Example: [bold]potstill prune smollm2 --keep 0.75 --data stdlib --out pruned[/]
    """
    from potstill.cli import tables
    from potstill.stages.prune import PruneConfig

    suppress_library_output()
    exact_sizes = {"layers": layers, "kv_heads": kv_heads, "ffn": ffn, "hidden": hidden}
    stage = PruneConfig(
        model=model,
        shape={name: size for name, size in exact_sizes.items() if size is not None},
        **o.read_options(PruneOptions, options),
    )
    if dry_run:
        from potstill.stages.dry_run_transforms import preview_prune

        report = preview_prune(stage, o.expand_path(out), overwrite=overwrite)
        return show_dry_run("prune", report, {"model": model, **exact_sizes, **options}, out=out, as_json=as_json)
    card = stage.run(o.expand_path(out), overwrite=overwrite)
    result = {"out": out, **card.to_dict()}
    return print_or_return(result, as_json, lambda: tables.print_pruned_model(out, card.details))
