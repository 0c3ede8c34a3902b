"""What a drafter is made from: the target, and the options of drafting."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.decode.drafters.drafter import Drafter
from potstill.models.load import LoadedModel, load_model

log = logging.getLogger("potstill")


@dataclass(frozen=True, kw_only=True)
class DraftSetup:
    """The target with its tokenizer and its engine's slots, and the shape of a draft.

    `widths` are the numbers of children by depth: (1, 1, 1) is a chain of three tokens. A model stops drafting where
    its likeliest token has a probability below `confidence`. `load_options` are those of `load_model` for a draft.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    slots: int
    context: int
    widths: Sequence[int]
    confidence: float = 0.0
    load_options: dict[str, Any] = field(default_factory=dict)

    @property
    def hidden(self) -> int:
        """The width of the model's hidden states."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def is_chain(self) -> bool:
        """Whether every token of a draft has one child."""
        return max(self.widths, default=1) == 1

    def load_draft(self, name: str) -> LoadedModel:
        """The draft model; a note warns of one that is larger than the target.

        Raises: NotFound, UnsafeModel or UnsupportedModel like `load_model`.
        """
        draft = load_model(name, device=self.model.device, dtype=self.model.dtype, **self.load_options)
        draft.model.eval()
        sizes = [sum(weight.numel() for weight in model.parameters()) for model in (draft.model, self.model)]
        if sizes[0] >= sizes[1]:
            log.warning(
                "warning: the draft %s has %s parameters and the model %s, so drafts cost more than they save; "
                "choose a draft 10 to 20 times smaller",
                *(name, f"{sizes[0]:,}", f"{sizes[1]:,}"),
            )
        return draft

    def refuse_options(self, name: str, *, tree: bool = False, confidence: bool = False) -> None:
        """Refuse `--tree` or a draft length by confidence for a drafter that has none.

        Raises: UsageError.
        """
        if tree and not self.is_chain:
            raise UsageError(f"--draft {name} proposes one continuation; omit --tree")
        if confidence and self.confidence > 0:
            raise UsageError(f"--draft {name} has no probabilities; give --draft-length a number, or cost")


@dataclass(frozen=True, kw_only=True)
class DrafterSpec:
    """A row of the registry: how `--draft` names a drafter, what it is, and how it is made.

    `argument` is what stands after the colon in `--draft NAME:ARGUMENT`, empty if there is none. `length` is the
    `--draft-length` by default. `make` receives the setup and the argument.
    """

    name: str
    argument: str
    help: str
    length: str
    make: Callable[[DraftSetup, str], Drafter]
