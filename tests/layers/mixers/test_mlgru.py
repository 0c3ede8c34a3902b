"""MLGRU: its equations, its bound and its memory; the laws of all kinds are elsewhere."""

import pytest
import torch

from potstill.core.blueprint import Rotary
from potstill.core.errors import UsageError
from potstill.layers.mixers.mlgru import MLGRU, MLGRUMixer
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory


def make_mixer(facts: MLGRU) -> MLGRUMixer:
    return MLGRUMixer(facts, PartFactory(6, lambda size: RMSNorm(size, eps=1e-5))).double()


@pytest.mark.parametrize("normalized", [False, True])
@torch.no_grad()
def test_a_token_is_what_the_equations_say(normalized: bool) -> None:
    mixer = make_mixer(MLGRU(5, 0.25, normalized_gate=normalized))
    x, h = torch.randn(1, 4, 6, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    y, _ = mixer(x, Positions(torch.arange(4)[None], Rotary(), 16))
    for t in range(4):
        forget = 0.25 + 0.75 * torch.sigmoid(mixer.forget.weight @ x[0, t])
        c = mixer.candidate.weight @ x[0, t]
        h = forget * h + (1 - forget) * c * torch.sigmoid(c)
        g = mixer.gate.weight @ x[0, t]
        gate = g / (g.square().mean() + 1e-5).sqrt() * torch.sigmoid(h) if normalized else torch.sigmoid(g)
        torch.testing.assert_close(y[0, t], mixer.o.weight @ (gate * h), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_the_bound_keeps_that_share_of_the_memory() -> None:
    mixer = make_mixer(MLGRU(5, 0.9))
    mixer.forget.weight.fill_(-1e3)
    state, x = mixer.state(), torch.ones(1, 1, 6, dtype=torch.float64)
    mixer(x, Positions(torch.zeros(1, 1, dtype=torch.long), Rotary(), 16), state)
    before = state.memory[0].clone()
    mixer.candidate.weight.zero_()
    mixer(x, Positions(torch.ones(1, 1, dtype=torch.long), Rotary(), 16, past_length=1), state)
    torch.testing.assert_close(state.memory[0], 0.9 * before)


@torch.no_grad()
def test_padding_after_a_text_keeps_its_memory_and_the_state_holds_no_other_token() -> None:
    mixer, x = make_mixer(MLGRU(5, 0.25)), torch.randn(1, 4, 6, dtype=torch.float64)
    alone, padded = mixer.state(), mixer.state()
    mixer(x[:, :3], Positions(torch.arange(3)[None], Rotary(), 16), alone)
    mask = torch.tensor([[True, True, True, False]])
    mixer(x, Positions(torch.arange(4)[None], Rotary(), 16, token_mask=mask), padded)
    torch.testing.assert_close(padded.memory[0], alone.memory[0], rtol=1e-12, atol=0)
    assert alone.memory[0].untyped_storage().nbytes() == alone.memory[0].nbytes


def test_memories_are_float32_for_models_in_bfloat16() -> None:
    mixer = make_mixer(MLGRU(5)).to(torch.bfloat16)
    state = mixer.state()
    y, _ = mixer(torch.randn(1, 3, 6).bfloat16(), Positions(torch.arange(3)[None], Rotary(), 16), state)
    assert y.dtype == torch.bfloat16
    assert state.memory[0].dtype == torch.float32
    assert MLGRU(5).state_bytes(1000, 2) == state.memory[0].nbytes


@pytest.mark.parametrize("bound", [-0.1, 1.0])
def test_a_bound_is_a_share(bound: float) -> None:
    with pytest.raises(UsageError, match="share of the memory"):
        MLGRU(5, bound)
