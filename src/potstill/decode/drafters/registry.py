"""All drafters by name, and what the options `--draft`, `--draft-length` and `--tree` mean."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.decode.draft_length import CostLength, FixedLength
from potstill.decode.drafters import (
    eagle,
    early_exit,
    independent,
    layer_skip,
    medusa,
    prompt_lookup,
    suffix,
    translated,
)
from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.options import DraftOptions
from potstill.decode.runner import ModelRunner
from potstill.decode.speculative import MOST_NODES, Speculation

_MODULES = (independent, translated, prompt_lookup, suffix, layer_skip, early_exit, medusa, eagle)
DRAFTERS: Mapping[str, DrafterSpec] = MappingProxyType({module.SPEC.name: module.SPEC for module in _MODULES})

DEFAULT_CONFIDENCE = 0.4
LONGEST_BY_CONFIDENCE, LONGEST_BY_COST = 8, 16


def make_speculation(
    runner: ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    options: DraftOptions,
    *,
    typical: bool = False,
    load_options: Mapping[str, Any] | None = None,
) -> Speculation | None:
    """The speculation that the options describe, for the target in `runner`; None without `draft`.

    Raises: UsageError for options that are no draft, or that exclude each other; UnsupportedModel for a target that
    cannot take tokens back.
    """
    if options.draft is None:
        return None
    spec, argument = find_drafter(options.draft)
    length, confidence = parse_draft_length(options.draft_length or spec.length)
    widths = (1,) * length.longest
    if options.tree is not None:
        if options.draft_length is not None and isinstance(length, CostLength):
            raise UsageError("--draft-length cost finds the length of chains; omit --tree")
        widths = parse_tree(options.tree)
        length = FixedLength(len(widths))
    model: PreTrainedModel = runner.model
    setup = DraftSetup(
        model=model,
        tokenizer=tokenizer,
        vocabulary=runner.vocabulary,
        slots=runner.num_slots,
        context=runner.context,
        widths=widths,
        confidence=confidence,
        load_options=dict(load_options or {}),
    )
    speculation = Speculation(
        drafter=spec.make(setup, argument),
        length=length,
        nodes=count_nodes(widths),
        siblings=max(widths, default=1),
        typical=typical,
    )
    speculation.check(runner)
    return speculation


def find_drafter(draft: str) -> tuple[DrafterSpec, str]:
    """The drafter that `--draft` names, and its argument; any other text is the name of a model.

    Raises: UsageError for a drafter without its argument, or with one that it does not take.
    """
    name, _, argument = draft.partition(":")
    spec = DRAFTERS.get(name)
    if spec is None:
        return DRAFTERS["model"], draft
    if bool(spec.argument) != bool(argument):
        usage = f"{spec.name}:{spec.argument}" if spec.argument else spec.name
        raise UsageError(f"--draft {draft} is incomplete or too long; write --draft {usage} ({spec.help})")
    return spec, argument


def parse_draft_length(text: str) -> tuple[FixedLength | CostLength, float]:
    """(length, confidence) of `--draft-length`; confidence is 0 unless the text names it.

    Raises: UsageError for anything but a number of at least 1, `confidence` or `cost`.
    """
    name, _, argument = text.partition(":")
    try:
        if name == "confidence":
            confidence = float(argument) if argument else DEFAULT_CONFIDENCE
            if 0 < confidence < 1:
                return FixedLength(LONGEST_BY_CONFIDENCE), confidence
        elif name == "cost":
            longest = int(argument) if argument else LONGEST_BY_COST
            if longest >= 1:
                return CostLength(longest), 0.0
        elif int(text) >= 1:
            return FixedLength(int(text)), 0.0
    except ValueError:
        pass
    raise UsageError(
        f"--draft-length is {text!r}; give a number of at least 1, confidence, confidence:0.4, cost or cost:16"
    )


def parse_tree(text: str) -> tuple[int, ...]:
    """The numbers of children by depth.

    Raises: UsageError for anything else, or for a tree of too many nodes.
    """
    try:
        widths = tuple(int(piece) for piece in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise UsageError(f"--tree is {text!r}; give the children of each node by depth, such as 4,2,1")
    if count_nodes(widths) > MOST_NODES:
        raise UsageError(f"--tree {text} has {count_nodes(widths)} nodes; give at most {MOST_NODES}")
    return widths


def count_nodes(widths: tuple[int, ...]) -> int:
    """The nodes of a tree with these numbers of children by depth."""
    nodes, level = 0, 1
    for width in widths:
        level *= width
        nodes += level
    return nodes
