"""The drafts to try, with their lengths and trees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.decode.draft_length import FixedLength
from potstill.decode.drafters.model_drafter import ModelDrafter
from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.runner import ModelRunner
from potstill.decode.speculative import Speculation
from potstill.evaluate.size import count_parameters
from potstill.evaluate.speculation.recording import CycleLength, RecordedSpeculation, schedule_lengths


@dataclass(frozen=True)
class Setting:
    """A draft with one length, or with a tree."""

    draft: str
    length: int | None = None
    tree: str | None = None

    @property
    def flags(self) -> str:
        """The options of `generate` and `serve` for it."""
        return f"--draft {self.draft} " + (f"--tree {self.tree}" if self.tree else f"--draft-length {self.length}")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A drafter that is made once, and the settings to try with it: chains of several lengths, or one tree.

    `parameter_share` is the size of a draft model as a share of the target's parameters; None for other drafters.
    """

    draft: str
    speculation: Speculation
    lengths: tuple[int, ...] = ()
    tree: str | None = None
    parameter_share: float | None = None

    @property
    def is_smaller(self) -> bool:
        """Whether the draft has fewer parameters than the target; a drafter without a model of its own has."""
        return self.parameter_share is None or self.parameter_share < 1

    @property
    def settings(self) -> list[Setting]:
        """A setting for each length, or that of the tree."""
        if self.tree is not None:
            return [Setting(self.draft, tree=self.tree)]
        return [Setting(self.draft, length=length) for length in self.lengths]

    def make_recorded(self) -> RecordedSpeculation:
        """The speculation with a record, in which all lengths take turns."""
        base = self.speculation
        lengths = self.lengths or (base.length.longest,)
        return RecordedSpeculation(
            drafter=base.drafter,
            length=CycleLength(schedule_lengths(lengths)),
            nodes=base.nodes,
            siblings=base.siblings,
        )

    def make_speculation(self, setting: Setting) -> Speculation:
        """The speculation of one of the settings."""
        if setting.length is None:
            return self.speculation
        return replace(self.speculation, length=FixedLength(setting.length), nodes=setting.length)


def make_candidates(
    runner: ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    drafts: Sequence[str],
    *,
    lengths: Sequence[int],
    trees: Sequence[str] = (),
    load_options: Mapping[str, Any] | None = None,
) -> tuple[list[Candidate], list[str]]:
    """(a candidate for each draft and for each draft with each tree, why some drafts take no tree).

    Raises: the errors of `make_speculation`; for a tree only if no draft takes it.
    """

    def make(draft: str, **shape: Any) -> Candidate:
        options = DraftOptions(draft=draft, tree=shape.get("tree"), draft_length=shape.pop("longest", None))
        speculation = make_speculation(runner, tokenizer, options, load_options=load_options)
        assert speculation is not None, "the options name a draft"
        share = compute_parameter_share(speculation, runner)
        return Candidate(draft=draft, speculation=speculation, parameter_share=share, **shape)

    ascending = tuple(sorted(set(lengths)))
    candidates = [make(draft, lengths=ascending, longest=str(ascending[-1])) for draft in drafts]
    refusals: list[str] = []
    for tree in trees:
        errors: list[UsageError] = []
        for draft in drafts:
            try:
                candidates.append(make(draft, tree=tree))
            except UsageError as error:
                errors.append(error)
        if len(errors) == len(drafts):
            raise errors[0]
        refusals += [str(error) for error in errors]
    return candidates, list(dict.fromkeys(refusals))


def compute_parameter_share(speculation: Speculation, runner: ModelRunner) -> float | None:
    """The parameters of a draft model over those of the target; None for a drafter without a model of its own."""
    drafter = speculation.drafter
    if not isinstance(drafter, ModelDrafter):
        return None
    draft, target = (count_parameters(model).total for model in (drafter.runner.model, runner.model))
    return draft / target
