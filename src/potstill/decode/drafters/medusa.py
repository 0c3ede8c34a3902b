"""Medusa heads: head k reads the target's last hidden state h_t and predicts token t + 2 + k.

    logits_k = W (h + SiLU(A_k h + b_k))

W is the target's own head, frozen. A_k and b_k begin at 0, so every head begins as the target's own prediction. The
draft is a tree of the likeliest tokens of each head.

Source: Cai et al., "Medusa" (arXiv:2401.10774), section 3.1, where each head also trains a copy of W.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from potstill.core.types import Head
from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.drafter import Draft, DraftContext, Drafter
from potstill.decode.drafters.head_folder import DraftHeads, check_width
from potstill.models.signals import get_head


class MedusaHeads(DraftHeads):
    """The residual blocks of `num_heads` heads for states of width `hidden`."""

    kind = "medusa"

    def __init__(self, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.sizes = {"hidden": hidden, "num_heads": num_heads}
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_heads))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "K *N D"]:
        """The states of all heads, from which the target's head makes logits."""
        return torch.stack([hidden + silu(block(hidden)) for block in self.blocks])


class MedusaDrafter(Drafter):
    """Drafts the `widths[d]` likeliest tokens of head d below every node of depth d."""

    takes_hidden = True

    def __init__(self, heads: MedusaHeads, head: Head, *, widths: Sequence[int]) -> None:
        self.heads, self.head = heads, head
        self.widths = tuple(widths[: len(heads.blocks)])
        self.hidden: dict[int, Tensor] = {}  # by slot: the state that the text's last token was drawn from

    def start(self, slot: int, ids: Sequence[int], hidden: Float[Tensor, "T D"] | None = None) -> None:
        """Keeps the state after the prompt."""
        assert hidden is not None
        self.hidden[slot] = hidden[-1]

    @torch.no_grad()
    def propose(self, context: DraftContext) -> Draft:
        """A tree with at most `limit` nodes, level by level."""
        widths = self.widths[: context.depth]
        if not widths or context.limit < 1:
            return Draft()
        states = self.heads(self.hidden[context.slot])[: len(widths)]
        logits = self.head.logits(states)
        tokens, parents, frontier = list[int](), list[int](), [-1]
        for width, row in zip(widths, logits, strict=True):
            likeliest, nodes = row.topk(width).indices.tolist(), list[int]()
            for parent in frontier:
                for token in likeliest[: context.limit - len(tokens)]:
                    nodes.append(len(tokens))
                    tokens.append(token)
                    parents.append(parent)
            frontier = nodes
        return Draft(tokens=tokens, parents=parents)

    def accept(self, slot: int, path: Sequence[int], token: int, hidden: Float[Tensor, "P D"] | None = None) -> None:
        """Keeps the state that the new last token was drawn from."""
        assert hidden is not None
        self.hidden[slot] = hidden[-1]

    def free(self, slot: int) -> None:
        """Forgets a text."""
        self.hidden.pop(slot, None)


def make_medusa(setup: DraftSetup, argument: str) -> MedusaDrafter:
    """A drafter with the heads in the folder `argument`.

    Raises: NotFound or ArtifactError without heads for this model; UsageError for a length by confidence.
    """
    setup.refuse_options(MedusaHeads.kind, confidence=True)
    heads = MedusaHeads.load(Path(argument).expanduser())
    check_width(Path(argument), heads.sizes["hidden"], setup.hidden)
    heads.to(device=setup.model.device, dtype=setup.model.dtype)
    head = get_head(setup.model).crop_vocabulary(setup.vocabulary)
    return MedusaDrafter(heads, head, widths=setup.widths)


SPEC = DrafterSpec(
    name=MedusaHeads.kind,
    argument="FOLDER",
    help="trained heads on the model's last hidden states",
    length="3",
    make=make_medusa,
)
