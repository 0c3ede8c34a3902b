"""The options of `generate --select`. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from potstill.core.errors import UsageError
from potstill.core.options import Option, list_options
from potstill.stages.generate_options import DataOptions, GenerateDatasetOptions

SELECT = "--select"
PREFER, MIXED, SOLVE = "prefer", "mixed", "solve"
SELECTIONS = (PREFER, MIXED, SOLVE)
SAMPLES = 8  # of a prompt, for preferences and mixed prompts
ROUNDS = (1, 8, 16, 32)  # samples of a prompt that is not solved yet
CONSISTENT, FIRST = "consistent", "first"
PIVOT_ANSWERS = (CONSISTENT, FIRST)
SELECTIONS_BY_OPTION = {  # of the options that not all selections read
    "consistency": (PREFER,),
    "pivot_pairs": (PREFER,),
    "pivot_answer": (PREFER,),
    "reward": (MIXED, SOLVE),
    "per_language": (MIXED,),
    "exclude": (MIXED,),
}


@dataclass(frozen=True, kw_only=True)
class CandidateOptions(DataOptions):
    """What is sampled for each prompt of a data set, and what is selected."""

    select: str | None = Option[str | None](
        None,
        "Sample several answers and select: prefer (pairs for DPO, by agreement with the answer in --pivot), mixed "
        "(prompts that some samples solve, for GRPO), or solve (a right solution in --pivot for each prompt).",
    ).field()
    samples: int = Option(
        0, f"Samples for each prompt, for --select; 0: {SAMPLES}, and for solve at most {ROUNDS[-1]} in a round."
    ).field()
    top_p: float = Option(
        1.0, "With --select: sample from the likeliest tokens that together have this probability."
    ).field()
    consistency: str = Option(
        "numbers", "What must agree for --select prefer: numbers (final answers), code, or text (embeddings)."
    ).field()
    reward: str = Option(
        "accuracy",
        "The rewards that are 1 for a right sample, for --select mixed and solve, such as accuracy+language.",
    ).field()
    pivot: str = Option(
        "en", "For --select: the language of the answers that others are compared with, and of solutions."
    ).field()
    pivot_pairs: bool = Option(
        False, "For --select prefer: write pairs of answers in --pivot too.", on_command_line=False
    ).field()
    pivot_answer: str = Option(
        CONSISTENT,
        "For --select prefer: the answer in --pivot that others are compared with, the most consistent or the first.",
        on_command_line=False,
    ).field()
    per_language: int = Option(
        0, "For --select mixed: prompts for each language, from the highest `tier` of the data down; 0: all."
    ).field()
    exclude: tuple[str, ...] = Option[tuple[str, ...]](
        (),
        "For --select mixed: leave out the prompts of this data set, such as those of an earlier round; repeat for "
        "several.",
    ).field()


def check_data_options(options: Mapping[str, Any], *, has_data: bool) -> None:
    """Refuse options of selected samples or of rewritten prompts that nothing would read.

    Raises: UsageError.
    """
    selection, rewriting = (_list_given(options, part) for part in (CandidateOptions, GenerateDatasetOptions))
    if SELECT in selection and not has_data:
        raise UsageError("--select compares samples for the prompts of a data set; give --data and --out")
    if selection and SELECT not in selection:
        raise UsageError(f"{selection[0]} is for --select; give that too, such as --select mixed")
    if rewriting and not has_data:
        raise UsageError(f"{rewriting[0]} is for the prompts of a data set; give --data and --out")
    if rewriting and selection:
        raise UsageError(f"{rewriting[0]} rewrites prompts, and --select takes them as they are; omit one of them")


def _list_given(options: Mapping[str, Any], options_class: type) -> list[str]:
    """The options of a class, without those of every data set, that are given and are not their defaults."""
    shared = {field.name for field in list_options(DataOptions)}
    return [
        "--" + field.name.replace("_", "-")
        for field in list_options(options_class)
        if field.name not in shared and (options.get(field.name) or field.option.default) != field.option.default
    ]
