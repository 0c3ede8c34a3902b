"""The network that a `Blueprint` describes: embedding, residual layers, final norm and head.

It depends on no family and no method. A mixer is `(x, positions, state) -> (y, state)`, a feed-forward is `(x,
positions) -> y`; the factory of `layers/registry.py` makes the module of each kind.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.depth_state import DepthState
from potstill.core.errors import UsageError
from potstill.core.state import State
from potstill.layers.embedding import ScaledEmbedding
from potstill.layers.heads import LanguageHead, TiedHead
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions, Reports
from potstill.layers.registry import DrawsWeights, PartFactory
from potstill.ops.attention import document_lengths, document_prefixes


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); with post-norms, x + norm(mixer(norm(x))) and so on.

    With a depth gate, only the tokens that it lets through.
    """

    def __init__(self, layer: Layer, factory: PartFactory) -> None:
        super().__init__()
        norm, hidden = factory.make_norm, factory.hidden
        self.mixer_norm = norm(hidden)
        self.mixer = factory.make_part(layer.mixer)
        self.mixer_post_norm = norm(hidden) if layer.post_norms else nn.Identity()
        self.ffn_norm = norm(hidden)
        self.ffn = factory.make_part(layer.ffn)
        self.ffn_post_norm = norm(hidden) if layer.post_norms else nn.Identity()
        self.depth = None if layer.depth is None else factory.make_part(layer.depth)

    def forward(
        self, x: Float[Tensor, "B T D"], positions: Positions, state: State | None = None
    ) -> tuple[Float[Tensor, "B T D"], State | None]:
        """(the residual stream after this layer, state)."""
        if self.depth is not None:
            gated_output: tuple[Tensor, State | None] = self.depth(x, positions, state, self._mix, self._feed)
            return gated_output
        mixed, state = self._mix(x, positions, state)
        x = x + mixed
        return x + self._feed(x, positions), state

    def make_state(self) -> State:
        """An empty state of this layer."""
        state: State = cast(Any, self.mixer).state()
        return state if self.depth is None else DepthState(state)

    def _mix(
        self, x: Float[Tensor, "B T D"], positions: Positions, state: State | None
    ) -> tuple[Float[Tensor, "B T D"], State | None]:
        """(what the mixer adds to x, state)."""
        output, state = self.mixer(self.mixer_norm(x), positions, state)
        return self.mixer_post_norm(output), state

    def _feed(self, x: Float[Tensor, "B T D"], positions: Positions) -> Float[Tensor, "B T D"]:
        """What the feed-forward adds to x."""
        output: Tensor = self.ffn_post_norm(self.ffn(self.ffn_norm(x), positions))
        return output


class Backbone(nn.Module):
    """The network of `blueprint`, with PyTorch's random weights until weights are loaded or `init_weights` is called.

    Its state dict has the names and shapes of `core.blueprint.weight_shapes`. In training, `gradient_checkpointing`
    computes each layer's forward a second time instead of storing its activations.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.gradient_checkpointing = False
        vocabulary, hidden, softcap = blueprint.vocabulary, blueprint.hidden, blueprint.logit_softcap
        norm = partial(RMSNorm, eps=blueprint.norm_eps, zero_centered=blueprint.zero_centred_norms)
        self.embed = ScaledEmbedding(vocabulary, hidden, scale=blueprint.embedding_scale)
        self.layers = nn.ModuleList(Block(layer, PartFactory(hidden, norm, layer.linear)) for layer in blueprint.layers)
        self.norm = norm(hidden)
        tied = blueprint.tied
        self.head = TiedHead(self.embed, softcap=softcap) if tied else LanguageHead(vocabulary, hidden, softcap=softcap)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None,
        position_ids: Int[Tensor, "B T"],
        states: Sequence[State] | None = None,
        *,
        token_mask: Bool[Tensor, "B S"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The last hidden states, after the final norm; the arguments are those of `residuals`."""
        *_, residual = self.residuals(
            input_ids, position_ids, states, token_mask=token_mask, inputs_embeds=inputs_embeds
        )
        hidden: Tensor = self.norm(residual)
        return hidden

    def residuals(
        self,
        input_ids: Int[Tensor, "B T"] | None,
        position_ids: Int[Tensor, "B T"],
        states: Sequence[State] | None = None,
        *,
        token_mask: Bool[Tensor, "B S"] | None = None,
        distances: Int[Tensor, "B T S"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        reports: Reports | None = None,
    ) -> Iterator[Float[Tensor, "B T D"]]:
        """The residual stream: the embeddings, then the output of each layer, before the final norm.

        A document begins where `position_ids` restart, and sees no other document, but for the prompt of a continuation
        (`core.types`). With `states` (see `make_states`)
        the tokens continue the text of the states, one document per row. `token_mask` marks the tokens (past ones
        first) that are not padding; `distances` replaces it where texts of several lengths or trees share a pass.
        `inputs_embeds` replaces the embeddings of `input_ids`. Parts append the tensors that they report to the lists
        in `reports`, by name.

        Raises:
            UsageError: the number of states is not the number of layers; several documents would share a state.
            UnsupportedModel: documents share a prompt in a padded batch, or before a recurrence or a convolution.
        """
        if states is not None and len(states) != len(self.layers):
            raise UsageError(f"{len(states)} states for {len(self.layers)} layers; make them with make_states()")
        positions = self._make_positions(position_ids, states, token_mask, distances)
        positions.reports = {} if reports is None else reports
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        yield x
        layer_states: Sequence[State | None] = states or [None] * len(self.layers)
        for block, state in zip(self.layers, layer_states, strict=True):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and states is None:
                x, _ = cast(Any, checkpoint)(block, x, positions, use_reentrant=False)
            else:
                x, _ = block(x, positions, state)
            yield x

    def make_states(self) -> list[State]:
        """A fresh state for each layer."""
        return [cast(Block, block).make_state() for block in self.layers]

    def _make_positions(
        self,
        position_ids: Int[Tensor, "B T"],
        states: Sequence[State] | None,
        token_mask: Bool[Tensor, "B S"] | None,
        distances: Int[Tensor, "B T S"] | None = None,
    ) -> Positions:
        past_length = states[0].get_seq_length() if states else 0
        positions = Positions(
            position_ids,
            self.blueprint.rotary,
            self.blueprint.context,
            past_length=past_length,
            token_mask=_drop_trivial_mask(token_mask),
            distances=distances,
        )
        positions.check_padding()
        if (
            distances is not None
            or positions.token_mask is not None
            or (states is not None and position_ids.shape[1] == 1)
        ):
            return positions
        ids = position_ids.cpu()
        lengths = document_lengths(ids)
        if states is not None and any(len(row) > 1 for row in lengths):
            raise UsageError("several documents in a row cannot share one state; decode each in its own row")
        if past_length == 0:
            positions.lengths, positions.prefixes = lengths, document_prefixes(ids, lengths)
        return positions


def init_weights(model: nn.Module, *, std: float = 0.02, rng: torch.Generator | None = None) -> None:
    """Draws fresh weights in place: matrices from N(0, std^2), biases 0, norms that multiply by 1.

    Modules with a `draw_weight` draw theirs afterwards. `std` is Hugging Face's `initializer_range`.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, std, generator=rng)
            else:
                weight.zero_()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.reset_parameters()
        elif isinstance(module, DrawsWeights):
            module.draw_weight(std, rng)


def _drop_trivial_mask(token_mask: Bool[Tensor, "B S"] | None) -> Bool[Tensor, "B S"] | None:
    return None if token_mask is None or bool(token_mask.all()) else token_mask
