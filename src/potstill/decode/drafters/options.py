"""The options of drafting, without torch, so that the help of a command is quick."""

from dataclasses import dataclass

from potstill.core.errors import UsageError
from potstill.core.options import DRAFT, DRAFT_LENGTH, TREE


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """The options of drafting, as on the command line.

    `draft` is NAME or NAME:ARGUMENT of a drafter, or a model. `draft_length` is a number, or how the number is found.
    `confidence:P` stops where the draft's likeliest token has a probability below P. `cost:N` finds the best length up
    to N. `tree` lists the children of each node by depth, such as `4,2,1`.
    """

    draft: str | None = DRAFT.field()
    draft_length: str | None = DRAFT_LENGTH.field()
    tree: str | None = TREE.field()

    def __post_init__(self) -> None:
        if self.draft is None and (self.draft_length is not None or self.tree is not None):
            name = "--draft-length" if self.tree is None else "--tree"
            raise UsageError(f"{name} is the shape of a draft; say with --draft what drafts")


NO_DRAFT = DraftOptions()
