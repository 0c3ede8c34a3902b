"""`potstill export`: a model in the format of another runtime."""

from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.stages.export.options import ExportOptions


@o.take_options(ExportOptions)
def export(
    model: o.Model,
    to: Annotated[str, typer.Option(help="The format: hf (a stock folder), gguf, onnx or openvino.")],
    out: Annotated[str, typer.Option(help="The folder to write; for a model without a draft also a .gguf file.")],
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Export a model for transformers, vLLM, llama.cpp, Ollama, ONNX Runtime or OpenVINO, and compare its tokens.

    Example: [bold]potstill export student --to gguf --type q8_0 --out student-gguf[/]
    """
    from potstill.cli import tables
    from potstill.stages.export.export import ExportConfig

    suppress_library_output()
    stage = ExportConfig(model=model, to=to, **o.read_options(ExportOptions, options))
    if dry_run:
        return print_or_return(stage.to_dict(), as_json, lambda: tables.print_facts(stage.to_dict()))
    result = stage.run(o.expand_path(out), overwrite=overwrite)
    return print_or_return(result, as_json, lambda: tables.print_export(result))
