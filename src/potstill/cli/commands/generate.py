"""`potstill generate`: generate text with a model."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from potstill.cli import options as o
from potstill.cli.dry_run import show_dry_run
from potstill.cli.output import print_or_return, suppress_library_output
from potstill.core.errors import UsageError
from potstill.core.options import build_options
from potstill.stages.candidates.options import CandidateOptions, check_data_options
from potstill.stages.generate_options import AnswerOptions, GenerateDatasetOptions

if TYPE_CHECKING:
    from potstill.stages.candidates.config import CandidatesConfig
    from potstill.stages.generate_dataset import GenerateDatasetConfig

STDIN = "-"


@o.take_options(GenerateDatasetOptions)
@o.take_options(CandidateOptions)
@o.take_options(AnswerOptions)
def generate(
    model: o.Model,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt to answer, or the first turn of --chat; '-' reads standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Chat in the terminal; from a pipe, each line of standard input is a turn.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Color the tokens that --draft wrote and the model kept, on a terminal.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer the prompts of this data set, and write the answers as a data set to --out; repeat it to mix "
            "several.",
            metavar="TEXT",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write the answers to --data in.")] = None,
    overwrite: o.Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the prompts that have no answer yet.")
    ] = False,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    **options: Any,
) -> Any:
    """Generate the answer to a prompt, chat, or answer all prompts of a data set as training data for a student.

    The text appears as it is written, and a note gives its speed. Temperature 0 is the model's own argmax. Above 0, an
    answer is sampled with the top_p, top_k, min_p and repetition_penalty of the model's generation config, which a note
    names; a data set is sampled without them.

    Example: [bold]potstill generate smollm2 --prompt "What is a pot still?"[/]

    Example: [bold]potstill generate smollm2 --chat[/]

    Example: [bold]potstill generate smollm2 --draft lookup --show --prompt "Repeat: the pot still distils the mash."[/]

    Example: [bold]potstill generate smollm2 --data pairs.jsonl --out answers[/]

    Example: [bold]potstill generate smollm2 --data pairs.jsonl --translate --languages en:0.5,fr:0.5 --out answers[/]

    Example: [bold]potstill generate smollm2 --data sums.jsonl --select mixed --temperature 0.9 --out prompts[/]
    """
    check_options(prompt, data or None, out, options, chat=chat, show=show, as_json=as_json)
    if data and out is not None:
        values = {"model": model, "data": data[0] if len(data) == 1 else tuple(data), **options}
        return generate_dataset(values, out, overwrite=overwrite, resume=resume, dry_run=dry_run, as_json=as_json)
    answer_options = build_options(AnswerOptions, options)
    suppress_library_output()
    if chat:
        return run_chat(model, answer_options, prompt, show=show)
    assert prompt is not None
    from potstill.cli.stream import show_answer
    from potstill.stages.generate_text import generate_text

    text = sys.stdin.read() if prompt == STDIN else prompt
    result = generate_text(
        model, text, answer_options, read=list if as_json else partial(show_answer, marks_draft=show)
    )
    return result if as_json else None


def run_chat(model: str, options: AnswerOptions, first_turn: str | None, *, show: bool) -> None:
    """Chat in the terminal."""
    from potstill.cli.chat import ChatScreen
    from potstill.cli.stream import choose_draft_style
    from potstill.stages.chat import Chat

    ChatScreen(Chat(model, options), draft_style=choose_draft_style() if show else "").run(first_turn)


def generate_dataset(
    values: Mapping[str, Any], out: str, *, overwrite: bool, resume: bool, dry_run: bool, as_json: bool
) -> Any:
    """Answer all prompts of a data set, or with `dry_run` say what that takes."""
    from potstill.cli import tables

    suppress_library_output()
    stage = build_stage(values)
    if dry_run:
        from potstill.stages.dry_run import preview_answers

        report = preview_answers(stage, o.expand_path(out), overwrite=overwrite, resume=resume)
        return show_dry_run("generate", report, values, out=out, as_json=as_json)
    card = stage.run(o.expand_path(out), overwrite=overwrite, resume=resume)
    return print_or_return({"out": out, **card}, as_json, lambda: tables.print_dataset(out, card["details"]))


def build_stage(values: Mapping[str, Any]) -> "CandidatesConfig | GenerateDatasetConfig":
    """The stage that answers a data set, or with --select the one that samples and selects."""
    from potstill.stages.candidates.config import build_dataset_stage

    options_class = GenerateDatasetOptions if values["select"] is None else CandidateOptions
    names = {"model": values["model"], "data": values["data"]}
    return build_dataset_stage({**o.read_options(options_class, values), **names})


def check_options(
    prompt: str | None,
    data: Sequence[str] | None,
    out: str | None,
    options: Mapping[str, Any],
    *,
    chat: bool,
    show: bool,
    as_json: bool,
) -> None:
    """Refuse a call that asks for no answer or for several kinds, and options that do not go together.

    Raises: UsageError.
    """
    if chat:
        check_chat(prompt, answers_data=bool(data or out), raw=options["raw"], as_json=as_json)
    elif (prompt is None) == (data is None) or (data is None) != (out is None):
        raise UsageError(
            "give --prompt for one answer, --chat for a chat, or --data and --out for the answers to a data set"
        )
    check_data_options(options, has_data=data is not None)
    if data is not None and options["draft"] is not None:
        raise UsageError("--draft drafts the answer to --prompt or --chat; omit it with --data")
    if show and options["draft"] is None:
        raise UsageError("--show colors what a draft wrote; say with --draft what drafts, or omit it")
    if show and as_json:
        raise UsageError("--show colors text on a terminal, and --json prints none; omit one of them")


def check_chat(prompt: str | None, *, answers_data: bool, raw: bool, as_json: bool) -> None:
    """Refuse what a chat cannot be combined with.

    Raises: UsageError.
    """
    if prompt == STDIN:
        raise UsageError("--chat reads its turns from standard input; give --prompt the text of the first turn")
    if answers_data:
        raise UsageError("--chat answers you, and --data with --out a data set; omit one of them")
    if raw:
        raise UsageError("--chat needs the chat template, which --raw leaves out; omit one of them")
    if as_json:
        raise UsageError("--chat prints text as it is written; omit --json, or give --prompt for one answer")
