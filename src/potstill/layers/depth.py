"""Runs a layer on the tokens whose gate reaches the threshold: mixture of depths (arXiv:2410.14268).

The tokens that run are gathered into one packed row, and their results are put back. So a skipped token costs one
product with the gate's weight, and nothing else.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from potstill.core.depth import EXECUTED, GATES, Depth
from potstill.core.depth_state import DepthState, ExecutedTokens
from potstill.core.errors import UnsupportedModel
from potstill.core.state import State
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds
from potstill.layers.selected_positions import SelectedPositions
from potstill.ops.precision import upcast

EPS = 1e-6  # under the root of rms(h)
Mix = Callable[[Tensor, Positions, State | None], tuple[Tensor, State | None]]  # norms included
Feed = Callable[[Tensor, Positions], Tensor]


@builds(Depth)
class DepthGate(nn.Module):
    """g = sigmoid(w h / rms(h) + b) of each token, and the layer for those tokens whose g reaches the threshold."""

    def __init__(self, facts: Depth, factory: PartFactory) -> None:
        super().__init__()
        self.facts = facts
        self.gate = nn.Linear(factory.hidden, 1)

    def compute_gates(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """(g, f g), in float32 at least and never in autocast: one rounded bit could turn a token round."""
        wide = upcast(x)
        directions = wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.gate.weight.to(wide.dtype), self.gate.bias.to(wide.dtype)
            logits = linear(directions, weight, bias)[..., 0]
        gates = logits.sigmoid()
        if self.facts.unit_logit is None:
            return gates, gates
        return gates, gates / torch.full_like(logits, self.facts.unit_logit).sigmoid()  # equal logits give exactly 1

    # the number of tokens that run differs in every pass
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, x: Float[Tensor, "B T D"], positions: Positions, state: State | None, mix: Mix, feed: Feed
    ) -> tuple[Float[Tensor, "B T D"], State | None]:
        """(h + f g (layer(h) - h), state), where `mix` and `feed` compute what the halves of the layer add to h.

        Raises:
            UnsupportedModel: the state is not one of `make_states`, or several branches of a text share the pass.
        """
        if not (state is None or isinstance(state, DepthState)) or _has_branches(positions):
            raise UnsupportedModel(
                "a layer that tokens may skip decodes one chain of tokens per row, with the states of make_states()"
            )
        gates, factors = self.compute_gates(x)
        is_executed = gates >= self.facts.threshold
        positions.report(GATES, gates)
        positions.report(EXECUTED, is_executed.to(gates.dtype))
        if positions.token_mask is not None:
            is_executed = is_executed & positions.is_token
        factors, count, rows = factors.to(x.dtype)[..., None], int(is_executed.sum()), len(x)
        texts = [] if state is None else state.open_texts(positions.ids)
        if count == 0 and state is None:  # one token runs with factor 0, so that each weight stays in the graph
            is_first = torch.arange(is_executed.numel(), device=x.device).view_as(is_executed) == 0
            output = _run_some(x, positions, factors * 0, is_first, texts, mix, feed)
        elif count == 0:
            output = x
        elif count == is_executed.numel() and (state is None or rows == 1):
            output = _run_all(x, positions, factors, texts[0] if texts else None, mix, feed)
        else:
            output = _run_some(x, positions, factors, is_executed, texts, mix, feed)
        if state is not None:
            state.advance(positions.ids)
        return output, state


def _run_all(
    x: Float[Tensor, "B T D"],
    positions: Positions,
    factors: Float[Tensor, "B T 1"],
    text: ExecutedTokens | None,
    mix: Mix,
    feed: Feed,
) -> Float[Tensor, "B T D"]:
    """The output if no token is skipped; with the state of a text, `x` is one row."""
    places = positions
    if text is not None and (len(text.slots) < text.length or positions.distances is not None):
        places = SelectedPositions(positions, None, text)
    mixed, _ = mix(x, places, None if text is None else text.state)
    if text is not None:
        text.extend(range(text.length, text.length + x.shape[1]), positions.ids[0])
    return x + factors * mixed + factors * feed(x + mixed, places)


def _run_some(
    x: Float[Tensor, "B T D"],
    positions: Positions,
    factors: Float[Tensor, "B T 1"],
    is_executed: Bool[Tensor, "B T"],
    texts: Sequence[ExecutedTokens],
    mix: Mix,
    feed: Feed,
) -> Float[Tensor, "B T D"]:
    """The output if some tokens are skipped: the others run as one packed row."""
    rows, indices = x.flatten(0, 1), is_executed.flatten().nonzero()[:, 0]
    selected, factors = rows[indices][None], factors.flatten(0, 1)[indices][None]
    places = SelectedPositions(positions, indices)
    if texts:
        mixed = _mix_texts(selected, positions, indices, texts, mix)
    else:
        mixed, _ = mix(selected, places, None)
    outputs = selected + factors * mixed + factors * feed(selected + mixed, places)
    return rows.index_copy(0, indices, outputs[0].to(rows.dtype)).view_as(x)


def _mix_texts(
    selected: Float[Tensor, "1 N D"],
    positions: Positions,
    indices: Int[Tensor, " N"],
    texts: Sequence[ExecutedTokens],
    mix: Mix,
) -> Float[Tensor, "1 N D"]:
    """What the mixer adds to the tokens at `indices`, row by row, since each row has a state of its own."""
    width, outputs = positions.ids.shape[1], []
    counts = torch.bincount(indices // width, minlength=len(texts)).tolist()
    pieces = zip(texts, indices.split(counts), selected.split(counts, 1), strict=True)
    for row, (text, row_indices, x) in enumerate(pieces):
        if len(row_indices):
            places = SelectedPositions(positions, row_indices, text)
            outputs.append(mix(x, places, text.state)[0])
            text.extend((row_indices + (text.length - row * width)).tolist(), places.ids[0])
    return torch.cat(outputs, 1)


def _has_branches(positions: Positions) -> bool:
    """Whether a text has several tokens at one position, as in a tree of drafts."""
    return positions.distances is not None and bool((positions.ids.diff() != 1).any())
