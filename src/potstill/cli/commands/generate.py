"""`potstill generate`: generate text with a model."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.errors import UsageError
from potstill.core.options import IGNORE_GENERATION_CONFIG
from potstill.stages.options import GenerateDatasetOptions


@o.take_options(GenerateDatasetOptions)
def generate(
    model: o.Model,
    prompt: Annotated[str | None, typer.Option(help="The prompt to answer; '-' reads standard input.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Answer the prompts of this data set, and write the answers as a data set to --out."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write the answers to --data in.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the prompt as it is, without the chat template.")] = False,
    ignore_generation_config: o.IgnoreGenerationConfig = IGNORE_GENERATION_CONFIG.default,
    overwrite: o.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the prompts that have no answer yet.")
    ] = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Generate the answer to a prompt, or answers to all prompts of a data set as training data for a student.

    Temperature 0 is the model's own argmax. Above 0, a single answer is sampled with the top_p, top_k, min_p and
    repetition_penalty of the model's generation config, which a note names; a data set is sampled without them.

    Example: [bold]potstill generate smollm2 --prompt "What is a pot still?"[/]

    Example: [bold]potstill generate smollm2 --data pairs.jsonl --out answers[/]
    """
    from potstill.cli import tables
    from potstill.stages.generate_dataset import GenerateDatasetConfig
    from potstill.stages.generate_text import PROMPT_OPTIONS, generate_text

    check_options(prompt, data, out, options)
    suppress_library_output()
    if data is not None and out is not None:
        stage = GenerateDatasetConfig(model=model, data=data, **o.read_options(GenerateDatasetOptions, options))
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
        raw=raw,
        ignore_generation_config=ignore_generation_config,
        **{name: options[name] for name in PROMPT_OPTIONS},
    )
    return print_or_return(result, as_json, lambda: print(result["text"]))


def check_options(prompt: str | None, data: str | None, out: str | None, options: Mapping[str, Any]) -> None:
    """Refuse a call that asks for no answer or for both kinds, and options out of their range.

    Raises: UsageError.
    """
    if (prompt is None) == (data is None) or (data is None) != (out is None):
        raise UsageError("give --prompt for one answer, or --data and --out for the answers to a data set")
    if options["max_tokens"] < 1:
        raise UsageError(f"--max-tokens is {options['max_tokens']}; it must be at least 1")
    if not options["temperature"] >= 0:
        raise UsageError(f"--temperature is {options['temperature']}; it must be at least 0 (0 is greedy)")
