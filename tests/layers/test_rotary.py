"""Rotary positions: what a rotation is, what it leaves alone, and transformers' own frequencies for every scaling."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from potstill.core.blueprint import Rotary
from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.serialization import freeze
from potstill.layers.rotary import frequencies, rotary_cos_sin, rotate

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def turn(ids: torch.Tensor, rotary: Rotary, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_cos_sin(ids, rotary, **({"head_dim": 8, "context": 32, "dtype": torch.float64} | options))


def test_pair_j_turns_by_position_times_theta_to_the_minus_two_j_over_k() -> None:
    x, ids = torch.randn(1, 1, 5, 8, dtype=torch.float64), torch.tensor([[0, 1, 2, 7, 30]])
    y = rotate(x, turn(ids, Rotary(100.0)))
    for t, position in enumerate(ids[0].tolist()):
        for j in range(4):
            angle = position * 100.0 ** (-2 * j / 8)
            pair = complex(float(x[0, 0, t, j]), float(x[0, 0, t, j + 4])) * complex(math.cos(angle), math.sin(angle))
            assert float(y[0, 0, t, j]) == pytest.approx(pair.real, abs=1e-5)
            assert float(y[0, 0, t, j + 4]) == pytest.approx(pair.imag, abs=1e-5)


def test_scores_depend_on_the_distance_alone_and_lengths_stay() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for offset in (0, 3, 11):
        a, b = (rotate(x, turn(torch.tensor([[p + offset]]), Rotary(50.0))) for x, p in ((q, 6), (k, 2)))
        scores.append(float((a * b).sum()))
        assert float(a.norm()) == pytest.approx(float(q.norm()), abs=1e-5)
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("size", [20, 50])
def test_every_scaling_turns_as_in_transformers(kind: str, size: int) -> None:
    scaling = SCALINGS[kind]
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 500.0},
    )
    ids = torch.arange(size)[None]
    theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), ids)
    ours = turn(ids, Rotary(500.0, freeze(scaling) if scaling else None), dtype=torch.float32)
    for mine, stock in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[:, 0], stock, rtol=0, atol=1e-6)


def test_a_dynamic_scaling_stretches_only_what_is_longer_than_the_context() -> None:
    rotary = Rotary(500.0, freeze(SCALINGS["dynamic"]))
    short, long = (frequencies(rotary, head_dim=8, context=32, length=n)[0] for n in (32, 64))
    assert short == pytest.approx(frequencies(Rotary(500.0), head_dim=8, context=32)[0])
    assert long[-1] < short[-1]


def test_frequencies_found_under_the_meta_device_are_real_numbers() -> None:
    with torch.device("meta"):
        found, factor = frequencies(Rotary(77.0, freeze(SCALINGS["yarn"])), head_dim=8, context=33)
    assert len(found) == 4
    assert factor > 1.0


def test_an_unknown_scaling_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'spiral' is not one of default"):
        frequencies(Rotary(1e4, freeze({"rope_type": "spiral"})), head_dim=8, context=32)


def test_a_part_of_a_head_is_turned_as_a_head_of_that_width() -> None:
    x, ids = torch.randn(1, 2, 5, 12), torch.arange(5)[None]
    whole, part = (
        rotary_cos_sin(ids, rotary, head_dim=width, context=64, dtype=torch.float32)
        for rotary, width in ((Rotary(50.0), 6), (Rotary(50.0, fraction=0.5), 12))
    )
    turned = rotate(x, part)
    assert torch.equal(turned[..., :6], rotate(x[..., :6], whole))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert Rotary.from_dict(Rotary(50.0, fraction=0.5).to_dict()).count_rotated(12) == 6
    assert "fraction" not in Rotary(50.0).to_dict()


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(UsageError, match="rotary fraction"):
        Rotary(fraction=fraction)
