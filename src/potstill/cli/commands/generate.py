"""`potstill generate`: text from a model."""

import sys
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.errors import UsageError


def generate(
    model: o.Model,
    prompt: Annotated[str | None, typer.Option(help="What to answer; '-' reads standard input.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Answer the prompts of this data set, into --out: a data set to distil from.")
    ] = None,
    columns: o.Columns = "",
    out: Annotated[str | None, typer.Option(help="The folder for the answers to --data.")] = None,
    documents: Annotated[int, typer.Option(help="How many prompts of --data to answer; 0 is all.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 1,
    overwrite: o.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue with the prompts that are not answered yet.")
    ] = False,
    dry_run: o.DryRun = False,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> Any:
    """Let a model write: one answer, or the answers to a data set, for a student to learn from.

    Example: [bold]potstill generate smollm2 --prompt "What is a pot still?"[/]

    Example: [bold]potstill generate smollm2 --data pairs.jsonl --out answers[/]
    """
    from potstill.cli import tables
    from potstill.stages.generate_dataset import GenerateDatasetConfig
    from potstill.stages.generate_text import generate_text

    if (prompt is None) == (data is None) or (data is None) != (out is None):
        raise UsageError("give --prompt for one answer, or --data with --out for those to a data set")

    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 1")
    if not temperature >= 0:
        raise UsageError(f"--temperature {temperature} must be at least 0, which is greedy")
    suppress_library_output()
    if data is not None and out is not None:
        stage = GenerateDatasetConfig(
            model=model,
            data=data,
            columns=columns,
            documents=documents,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            device=device,
            dtype=dtype,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        if dry_run:
            return print_or_return(stage.to_dict(), as_json, lambda: tables.print_facts(stage.to_dict()))
        card = stage.run(o.expand_path(out), overwrite=overwrite, resume=resume)
        return print_or_return(
            {"out": out, **card}, as_json, lambda: tables.print_facts({"out": out, **card["details"]})
        )
    assert prompt is not None
    result = generate_text(
        model,
        sys.stdin.read() if prompt == "-" else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        raw=raw,
        device=device,
        seed=seed,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    return print_or_return(result, as_json, lambda: print(result["text"]))
