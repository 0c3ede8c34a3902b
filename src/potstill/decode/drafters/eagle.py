"""A feature-level draft: one decoder layer that continues the target's last hidden states.

    f_hat[t+1] = layer(W [embed(x[t+1]); f[t]])        logits of x[t+2] = head(f_hat[t+1])

f are the target's own features where it has read the text, and the draft's inside a draft. Embedding and head are the
target's, frozen. The layer's keys and values of the text are kept; those of a draft are dropped.

Source: Li et al., "EAGLE" (arXiv:2401.15077), section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from potstill.core.state import commit as commit_cache
from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.draft_tree import DraftTree
from potstill.decode.drafters.drafter import Draft, DraftContext, Drafter
from potstill.decode.drafters.head_folder import DraftHeads, check_width
from potstill.models.signals import get_head


class FeatureDraft(DraftHeads):
    """The layer: a Llama layer of width `hidden` with `num_heads` heads and a feed-forward of width `intermediate`."""

    kind = "eagle"

    def __init__(
        self, *, hidden: int, num_heads: int, intermediate: int, context: int, rope_theta: float = 1e4
    ) -> None:
        super().__init__()
        self.sizes = {
            "hidden": hidden,
            "num_heads": num_heads,
            "intermediate": intermediate,
            "context": context,
            "rope_theta": rope_theta,
        }
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=1,
            num_attention_heads=num_heads,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            attn_implementation="sdpa",
        )
        self.inputs = nn.Linear(2 * hidden, hidden)
        self.network = LlamaModel(config)
        del self.network.embed_tokens
        self.network.norm = nn.Identity()

    def forward(
        self,
        embeddings: Float[Tensor, "1 T D"],
        features: Float[Tensor, "1 T D"],
        *,
        cache: Any = None,
        **options: Any,
    ) -> Float[Tensor, "1 T D"]:
        """The next feature at each position. With a `cache` the positions continue its text."""
        inputs = self.inputs(torch.cat([embeddings, features], -1))
        output = self.network(inputs_embeds=inputs, past_key_values=cache, use_cache=cache is not None, **options)
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass
class FeatureText:
    """A text: the cache of the layer, and the target's features that it has not read."""

    features: Float[Tensor, "T D"]
    cache: Any = field(default_factory=DynamicCache)

    @property
    def length(self) -> int:
        """The number of positions that the layer has read."""
        return int(self.cache.get_seq_length())


class EagleDrafter(Drafter):
    """Drafts with `draft` for `model`; a node at depth d has `widths[d]` children."""

    takes_hidden = True

    def __init__(
        self,
        draft: FeatureDraft,
        model: PreTrainedModel,
        *,
        vocabulary: int,
        widths: Sequence[int],
        confidence: float = 0.0,
    ) -> None:
        self.draft, self.widths, self.confidence = draft, tuple(widths), confidence
        self.embed = model.get_input_embeddings()
        self.head = get_head(model).crop_vocabulary(vocabulary)
        self.texts: dict[int, FeatureText] = {}

    def start(self, slot: int, ids: Sequence[int], hidden: Float[Tensor, "T D"] | None = None) -> None:
        """Keeps the features of the prompt, to be read with the first draft."""
        assert hidden is not None
        self.texts[slot] = FeatureText(hidden)

    @torch.no_grad()
    def propose(self, context: DraftContext) -> Draft:
        """Reads the text's new features, then grows a tree level by level."""
        text = self.texts[context.slot]
        if context.limit < 1 or not context.depth or len(context.ids) + context.depth > self.draft.sizes["context"]:
            return Draft()
        start = text.length
        feature = self._read(text, context.ids[start + 1 :], text.features)[-1:]
        text.features = text.features[:0]
        tree = DraftTree(context, (), self.widths, self.confidence)
        features, num_read = feature, 0  # row 0: of the text; row 1 + i: of node i
        logits = self._compute_logits(feature)
        while True:
            tree.grow(logits)
            if not tree.frontier:
                break
            new = range(num_read, len(tree.tokens))
            parents = torch.tensor([tree.parents[node] + 1 for node in new])
            level = self._read_level(text, tree, new, features[parents])
            features, logits = torch.cat([features, level]), torch.cat([logits, self._compute_logits(level)])
            num_read = len(tree.tokens)
        commit_cache(text.cache, len(context.ids) - 1)
        return tree.make_draft()

    def accept(self, slot: int, path: Sequence[int], token: int, hidden: Float[Tensor, "P D"] | None = None) -> None:
        """Keeps the target's features of the new tokens, to be read with the next draft."""
        assert hidden is not None
        text = self.texts[slot]
        text.features = torch.cat([text.features, hidden])

    def free(self, slot: int) -> None:
        """Forgets a text."""
        self.texts.pop(slot, None)

    def _read(self, text: FeatureText, ids: Sequence[int], features: Tensor, **options: Any) -> Tensor:
        tokens = torch.tensor([list(ids)], device=features.device)
        output = self.draft(self.embed(tokens), features[None], cache=text.cache, **options)
        rows: Tensor = output[0]
        return rows

    def _read_level(self, text: FeatureText, tree: DraftTree, nodes: range, features: Tensor) -> Tensor:
        """The features after new nodes, which see the text and their ancestors."""
        committed = text.length - nodes.start
        mask = torch.zeros(len(nodes), committed + nodes.stop, dtype=torch.bool)
        mask[:, :committed] = True
        for row, node in enumerate(nodes):
            while node >= 0:
                mask[row, committed + node] = True
                node = tree.parents[node]
        positions = torch.full((1, len(nodes)), committed + tree.depth - 1, device=features.device)
        tokens = [tree.tokens[node] for node in nodes]
        device_mask = mask[None, None].to(features.device)
        return self._read(text, tokens, features, attention_mask=device_mask, position_ids=positions)

    def _compute_logits(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        return self.head.logits(features).float()


def make_eagle(setup: DraftSetup, argument: str) -> EagleDrafter:
    """A drafter with the layer in the folder `argument`.

    Raises: NotFound or ArtifactError without a layer for this model.
    """
    draft = FeatureDraft.load(Path(argument).expanduser())
    check_width(Path(argument), draft.sizes["hidden"], setup.hidden)
    draft.to(device=setup.model.device, dtype=setup.model.dtype)
    return EagleDrafter(
        draft.eval(), setup.model, vocabulary=setup.vocabulary, widths=setup.widths, confidence=setup.confidence
    )


SPEC = DrafterSpec(
    name=FeatureDraft.kind,
    argument="FOLDER",
    help="a trained layer that continues the model's last hidden states",
    length="5",
    make=make_eagle,
)
