"""A drafter with a model that reads the target's tokens: what independent drafts, skipped layers and early exits share.

The model has slots of its own. A draft grows level by level. Each level is one pass over the tokens that the model has
not read yet and the whole tree so far. Nothing of a rejected draft stays behind. When the target keeps a path, the
model keeps the keys and values of that path. The last token of a draft is never read while drafting: if it is kept, the
next draft reads it with the token after it.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.decode.drafters.draft_setup import DraftSetup
from potstill.decode.drafters.draft_tree import DraftTree, pack_trees
from potstill.decode.drafters.drafter import Draft, DraftContext, Drafter
from potstill.decode.runner import ModelRunner


class ModelDrafter(Drafter):
    """Drafts with `runner`, whose model reads the target's token ids.

    A node at depth d has `widths[d]` children; a chain of g tokens has widths (1,) * g. No node is expanded where the
    likeliest token has a probability below `confidence`.
    """

    def __init__(self, runner: ModelRunner, *, widths: Sequence[int], confidence: float = 0.0) -> None:
        self.runner, self.widths, self.confidence = runner, tuple(widths), confidence
        self._trees: dict[int, DraftTree] = {}

    def start(self, slot: int, ids: Sequence[int], hidden: Float[Tensor, "T D"] | None = None) -> None:
        """Reads the prompt; a text beyond the context of the draft gets empty drafts."""
        if len(ids) < self.runner.context:
            self.runner.prefill(slot, ids)

    def propose(self, context: DraftContext) -> Draft:
        """The draft of one text."""
        return self.propose_batch([context])[0]

    def propose_batch(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """The drafts of several texts, one pass per level for all of them."""
        trees = [self._make_tree(context) for context in contexts]
        self._trees = {tree.context.slot: tree for tree in trees}
        while growing := [tree for tree in trees if tree.frontier]:
            for tree, logits in zip(growing, self._read(growing), strict=True):
                tree.grow(logits)
        return [tree.make_draft() for tree in trees]

    def accept(self, slot: int, path: Sequence[int], token: int, hidden: Float[Tensor, "P D"] | None = None) -> None:
        """Keeps the text that was read and the nodes of the path, as far as they were read."""
        tree = self._trees.pop(slot, None)
        if tree is None or not tree.tokens:
            return
        num_unread = len(tree.unread)
        kept_nodes = [num_unread + node for node in path if node < tree.num_read]
        self.runner.commit(slot, [*range(num_unread), *kept_nodes])

    def free(self, slot: int) -> None:
        """Forgets a text."""
        self._trees.pop(slot, None)
        self.runner.free(slot)

    def _make_tree(self, context: DraftContext) -> DraftTree:
        unread = context.ids[self.runner.get_length(context.slot) :]
        fits = len(context.ids) + context.depth <= self.runner.context
        return DraftTree(context, unread, self.widths if fits else (), self.confidence)

    def _read(self, trees: Sequence[DraftTree]) -> list[Float[Tensor, "T V"]]:
        """The logits after each token of the chunk of each tree."""
        chunks = [tree.chunk for tree in trees]
        tokens, parents = pack_trees(chunks, device=self.runner.device)
        logits = self.runner.forward([tree.context.slot for tree in trees], tokens, parents).logits
        return [rows[: len(chunk_tokens)] for rows, (chunk_tokens, _) in zip(logits, chunks, strict=True)]


def make_model_drafter(
    setup: DraftSetup,
    model: PreTrainedModel,
    *,
    context: int | None = None,
    token_ids: Int[Tensor, " S"] | None = None,
) -> ModelDrafter:
    """A drafter with `model`, which has the target's tokenizer, and by default a context of its own.

    With `token_ids` it drafts these tokens alone.
    """
    runner = ModelRunner(model, vocabulary=setup.vocabulary, slots=setup.slots, context=context, token_ids=token_ids)
    return ModelDrafter(runner, widths=setup.widths, confidence=setup.confidence)
