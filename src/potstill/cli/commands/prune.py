"""`potstill prune`: cut a model to a size."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output


def prune(
    model: o.Model,
    out: o.Out,
    keep: o.Keep = None,
    params: o.Params = None,
    strategy: o.Strategy = "auto",
    layers: Annotated[int | None, typer.Option(help="Exact number of layers.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Exact number of key/value heads.")] = None,
    ffn: Annotated[int | None, typer.Option(help="Exact number of feed-forward neurons.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Exact hidden size.")] = None,
    layers_by: Annotated[str, typer.Option(help="Which layers go: by harm (measured) or evenly.")] = "harm",
    data: o.Data = "stdlib",
    columns: o.Columns = "",
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Cut a model to a size; it stays of its family, and the logits are compared after a reload.

    Example: [bold]potstill prune smollm2 --keep 0.75 --data stdlib --out pruned[/]
    """
    from potstill.cli import tables
    from potstill.stages.prune import PruneConfig

    suppress_library_output()
    exact_sizes = {"layers": layers, "kv_heads": kv_heads, "ffn": ffn, "hidden": hidden}
    stage = PruneConfig(
        model=model,
        data=data,
        columns=columns,
        keep=keep,
        params=o.parse_count(params),
        strategy=strategy,
        shape={k: v for k, v in exact_sizes.items() if v is not None},
        layers_by=layers_by,
        device=device,
        dtype=dtype,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        return print_or_return(stage.to_dict(), as_json, lambda: tables.print_facts(stage.to_dict()))
    card = stage.run(o.expand_path(out), overwrite=overwrite)
    result = {"out": out, **card.to_dict()}
    return print_or_return(result, as_json, lambda: tables.print_pruned_model(out, card.details))
