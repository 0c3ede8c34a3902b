"""A budget becomes a shape that is within 2 % of it, balanced and round; or a sentence that says what would do."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layers.extensions.gated_delta import GatedDelta
from tests.transforms.small import KINDS
from transformers import LlamaConfig

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import InfeasibleTarget, UnsupportedModel, UsageError
from potstill.layers.ffn.experts import Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone
from potstill.transforms.fit import (
    STRATEGIES,
    Shape,
    count_parameters,
    fit_shape,
    get_dimensions,
    get_shape,
    resize_blueprint,
)

SMOLLM2 = Blueprint(49152, 576, (Layer(Attention(9, 3, 64), SwiGLU(1536)),) * 30, tied=True)
LLAMA2_7B = Blueprint(49216, 4096, (Layer(Attention(32, 32, 128), SwiGLU(11008)),) * 32)  # its vocabulary as in MiniMA
PUBLISHED = {
    "SmolLM2-135M": SMOLLM2,
    "SmolLM2-360M": Blueprint(49152, 960, (Layer(Attention(15, 5, 64), SwiGLU(2560)),) * 32, tied=True),
    "Qwen2.5-0.5B": Blueprint(151936, 896, (Layer(Attention(14, 2, 64, qkv_bias=True), SwiGLU(4864)),) * 24, tied=True),
    "Qwen3-0.6B": Blueprint(151936, 1024, (Layer(Attention(16, 8, 128, qk_norm=True), SwiGLU(3072)),) * 28, tied=True),
    "Llama-3.2-1B": Blueprint(128256, 2048, (Layer(Attention(32, 8, 64), SwiGLU(8192)),) * 16, tied=True),
    "TinyLlama-1.1B": Blueprint(32000, 2048, (Layer(Attention(32, 4, 64), SwiGLU(5632)),) * 22),
}
SHARES = st.floats(0.05, 1.0)


FACTS = st.fixed_dictionaries(
    {
        "kv_heads": st.integers(1, 6),
        "queries": st.integers(1, 4),
        "head_dim": st.sampled_from([8, 16, 64]),
        "flags": st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
        "ffn": st.integers(32, 1500),
        "layers": st.integers(2, 12),
        "vocabulary": st.integers(50, 30000),
        "hidden": st.integers(32, 700),
    }
)


def blueprint_of(facts: dict[str, Any]) -> Blueprint:
    """A blueprint from drawn facts; in half of them the heads divide the hidden size, as a Llama demands."""
    heads, (tied, biased, norms, free, qkv) = facts["kv_heads"] * facts["queries"], facts["flags"]
    mixer = Attention(heads, facts["kv_heads"], facts["head_dim"], qkv_bias=qkv, out_bias=biased, qk_norm=norms)
    hidden = facts["hidden"] if free else math.ceil(facts["hidden"] / heads) * heads
    layer = Layer(mixer, SwiGLU(facts["ffn"], bias=biased))
    return Blueprint(facts["vocabulary"], hidden, (layer,) * facts["layers"], tied=tied)


def dims_of(strategy: str) -> tuple[str, ...]:
    return get_dimensions(SMOLLM2, strategy, 1.0)


def share(blueprint: Blueprint, shape: Shape) -> float:
    return count_parameters(resize_blueprint(blueprint, shape)) / count_parameters(blueprint)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_network(kind: str) -> None:
    layer = KINDS[kind].layers[0]
    blueprint = replace(KINDS[kind], layers=(layer, replace(layer, ffn=replace(layer.ffn, width=7))))
    assert count_parameters(blueprint) == sum(weight.numel() for weight in Backbone(blueprint).parameters())


def test_parameters_of_published_models() -> None:
    assert count_parameters(SMOLLM2) == 134_515_008
    minima = resize_blueprint(LLAMA2_7B, Shape(layers=24, kv_heads=24, ffn=8192, hidden=3072))
    matrices = sum(math.prod(shape) for shape in weight_shapes(minima).values() if len(shape) == 2)
    assert matrices == 3_020_292_096


def test_minima_3b_comes_out_of_its_size_alone() -> None:
    assert fit_shape(LLAMA2_7B, params=3_020_292_096) == Shape(layers=24, kv_heads=24, ffn=8192, hidden=3072)


@pytest.mark.parametrize(
    ("sparsity", "each"), [(10, 5), (20, 11), (30, 16), (40, 23), (50, 29), (70, 45), (80, 55), (90, 68)]
)
def test_width_alone_is_minimas_square_root_rule(sparsity: int, each: int) -> None:
    """Its table: sparsity of all and of each dimension, in per cent; without embeddings, which obey another rule."""
    blueprint = Blueprint(1, 2048, (Layer(Attention(32, 32, 64), SwiGLU(6400)),), tied=True)
    shape = fit_shape(blueprint, keep=1 - sparsity / 100, dims=dims_of("width"))
    kept = (shape["kv_heads"] / 32, shape["ffn"] / 6400, shape["hidden"] / 2048)
    assert kept == pytest.approx([1 - each / 100] * 3, abs=0.06)  # 32 heads come in steps of 0.03
    assert shape["layers"] == 1


@settings(max_examples=30)
@given(FACTS, SHARES, st.sampled_from(sorted(STRATEGIES)))
def test_a_share_is_reached_within_two_per_cent_or_refused(facts: dict[str, Any], keep: float, strategy: str) -> None:
    blueprint = blueprint_of(facts)
    dims = dims_of(strategy)
    try:
        shape = fit_shape(blueprint, keep=keep, dims=dims)
    except InfeasibleTarget as error:
        named = int(re.search(r"nearest has ([\d,]+)", str(error))[1].replace(",", ""))  # type: ignore[index]
        assert abs(named / (keep * count_parameters(blueprint)) - 1) > 0.0199
        return
    new, old = resize_blueprint(blueprint, shape), get_shape(blueprint)
    assert abs(count_parameters(new) / (keep * count_parameters(blueprint)) - 1) < 0.0201
    assert get_shape(new) == shape
    assert all(1 <= a <= b for a, b in zip(shape.values(), old.values(), strict=True))
    assert all(a == b for dim, a, b in zip(old, shape.values(), old.values(), strict=True) if dim not in dims)
    heads = blueprint.layers[0].mixer.heads
    assert new.layers[0].mixer.heads * old["kv_heads"] == heads * shape["kv_heads"]
    if blueprint.hidden % heads == 0:  # else its family does not mind
        assert new.hidden % new.layers[0].mixer.heads == 0


@pytest.mark.parametrize("model", PUBLISHED.values(), ids=PUBLISHED)
@settings(max_examples=4)
@given(keep=st.floats(0.3, 1.0))
def test_published_models_reach_every_share_by_width_and_by_both(model: Blueprint, keep: float) -> None:
    for strategy in ("width", "both"):
        shape = fit_shape(model, keep=keep, dims=dims_of(strategy))
        assert share(model, shape) == pytest.approx(keep, rel=0.02)
        assert shape["hidden"] % (model.layers[0].mixer.heads // get_shape(model)["kv_heads"] * shape["kv_heads"]) == 0


@settings(max_examples=30)
@given(FACTS, st.sampled_from(sorted(STRATEGIES)))
def test_keeping_all_changes_nothing(facts: dict[str, Any], strategy: str) -> None:
    blueprint = blueprint_of(facts)
    shape = fit_shape(blueprint, keep=1.0, dims=dims_of(strategy))
    assert resize_blueprint(blueprint, shape) == blueprint
    assert fit_shape(blueprint, params=count_parameters(blueprint)) == fit_shape(blueprint) == shape


@pytest.mark.parametrize("keep", [0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_smollm2_fits_every_share_by_every_strategy_in_round_numbers(keep: float, strategy: str) -> None:
    shape = fit_shape(SMOLLM2, keep=keep, dims=dims_of(strategy))
    assert share(SMOLLM2, shape) == pytest.approx(keep, rel=0.02)
    assert shape["hidden"] % 12 == shape["ffn"] % 8 == 0  # 9 heads rule out most multiples of 8
    LlamaConfig(hidden_size=shape["hidden"], num_attention_heads=3 * shape["kv_heads"], head_dim=64)  # or it raises
    ratios = [new / old for new, old in zip(shape.values(), get_shape(SMOLLM2).values(), strict=True)]
    cut = [ratio for ratio, dim in zip(ratios, tuple(get_shape(SMOLLM2)), strict=True) if dim in dims_of(strategy)]
    if strategy == "both":
        assert min(cut) > keep**0.5 - 0.05  # no dimension pays for the others


def test_explicit_sizes_are_taken_and_the_rest_is_fitted() -> None:
    shape = fit_shape(SMOLLM2, keep=0.6, exact_sizes={"layers": 24, "kv_heads": 3})
    assert (shape["layers"], shape["kv_heads"]) == (24, 3)
    assert share(SMOLLM2, shape) == pytest.approx(0.6, rel=0.02)
    assert fit_shape(SMOLLM2, exact_sizes={"ffn": 1000}) == get_shape(SMOLLM2).change({"ffn": 1000})


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, 75.0, math.nan, math.inf])
def test_a_share_outside_zero_to_one_is_a_wrong_call(keep: float) -> None:
    with pytest.raises(UsageError, match=rf"--keep {keep} must be above 0 and at most 1") as error:
        fit_shape(SMOLLM2, keep=keep)
    assert error.value.exit_code == 2
    assert not isinstance(error.value, InfeasibleTarget)


def test_explicit_sizes_that_no_stock_llama_has_are_refused() -> None:
    for dims in ((), ("ffn",), tuple(get_shape(SMOLLM2))):  # no number of heads in threes divides 416
        with pytest.raises(InfeasibleTarget, match=r"hidden 416 is no multiple of 9 heads.*ask for hidden 414"):
            fit_shape(SMOLLM2, keep=0.7, dims=dims, exact_sizes={"hidden": 416})
    with pytest.raises(InfeasibleTarget, match="hidden 416 is no multiple of 9 heads"):
        fit_shape(SMOLLM2, exact_sizes={"hidden": 416})
    assert fit_shape(SMOLLM2, exact_sizes={"hidden": 414})["hidden"] == 414
    assert fit_shape(SMOLLM2, keep=0.5, exact_sizes={"hidden": 384})["kv_heads"] == 2  # 6 heads divide 384, 9 do not


def test_a_target_larger_than_the_teacher_is_refused_in_one_sentence() -> None:
    with pytest.raises(InfeasibleTarget, match=r"--params 200,000,000 is more than the teacher's 134,515,008; ask for"):
        fit_shape(SMOLLM2, params=200_000_000)
    with pytest.raises(InfeasibleTarget, match="hidden 577 is more than the teacher's 576"):
        fit_shape(SMOLLM2, exact_sizes={"hidden": 577})


def test_an_infeasible_target_names_the_nearest_shape_and_that_shape_is_feasible() -> None:
    with pytest.raises(InfeasibleTarget, match=r"38,932,416 \(3 layers, .*hidden 576.*--keep 0.289") as error:
        fit_shape(SMOLLM2, keep=0.3, dims=("layers",))
    assert "\n" not in str(error.value)
    assert fit_shape(SMOLLM2, keep=0.289, dims=("layers",))["layers"] == 3


def test_much_that_stays_is_cut_in_depth_and_little_in_all_dimensions() -> None:
    assert get_dimensions(SMOLLM2, "auto", 0.75) == get_dimensions(SMOLLM2, "auto", 0.7) == ("layers",)
    assert get_dimensions(SMOLLM2, "auto", 0.69) == tuple(get_shape(SMOLLM2))
    assert get_dimensions(SMOLLM2, "width", 0.75) == dims_of("width")
    with pytest.raises(InfeasibleTarget, match="134,515,008"):  # larger than explicit sizes allow
        fit_shape(SMOLLM2, keep=0.9, exact_sizes={dim: get_shape(SMOLLM2)[dim] for dim in tuple(get_shape(SMOLLM2))})


def test_tiny_targets_are_refused_not_divided_by() -> None:
    with pytest.raises(InfeasibleTarget, match="no shape has 1 parameters"):
        fit_shape(SMOLLM2, keep=1e-12)
    with pytest.raises(UsageError, match="--params 0 must be at least 1"):
        fit_shape(SMOLLM2, params=0)


def test_contradictions_and_unknown_names_are_wrong_calls() -> None:
    with pytest.raises(UsageError, match="both set the size"):
        fit_shape(SMOLLM2, keep=0.5, params=10)
    with pytest.raises(UsageError, match="'depth' is no dimension that can be cut; those are layers, kv_heads"):
        fit_shape(SMOLLM2, keep=0.5, dims=("depth",))
    with pytest.raises(UsageError, match="'heads' is no dimension"):
        fit_shape(SMOLLM2, exact_sizes={"heads": 3})
    with pytest.raises(UsageError, match="ffn 0 must be at least 1"):
        fit_shape(SMOLLM2, exact_sizes={"ffn": 0})


def test_layers_of_different_widths_are_not_fitted() -> None:
    layer = SMOLLM2.layers[0]
    with pytest.raises(UnsupportedModel, match="2 different widths"):
        fit_shape(replace(SMOLLM2, layers=(layer, replace(layer, ffn=SwiGLU(8)))), keep=0.5)


def test_a_shape_reads_as_words_and_as_a_card() -> None:
    shape = Shape(layers=2, kv_heads=1, ffn=64, hidden=32)
    assert str(shape) == "2 layers, kv_heads 1, ffn 64, hidden 32"
    assert dict(shape) == {"layers": 2, "kv_heads": 1, "ffn": 64, "hidden": 32}


def test_a_hybrid_stack_is_refused_by_the_kinds_of_its_layers() -> None:
    layer = SMOLLM2.layers[0]
    hybrid = replace(SMOLLM2, layers=(layer, replace(layer, mixer=GatedDelta(9, 64))))
    with pytest.raises(UnsupportedModel, match=r"2 kinds \(attention and swiglu; test_gated_delta and swiglu\)"):
        fit_shape(hybrid, keep=0.5)
    biased = replace(layer, ffn=SwiGLU(1536, bias=True))
    with pytest.raises(UnsupportedModel, match="differ in their weights"):
        fit_shape(replace(SMOLLM2, layers=(layer, biased)), keep=0.5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stack_of_another_kind_is_fitted_in_the_widths_that_it_declares(strategy: str) -> None:
    layer = Layer(GatedDelta(16, 16), Experts(SwiGLU(256), 2))
    blueprint = Blueprint(1000, 256, (layer,) * 12)
    shape = fit_shape(blueprint, keep=0.7, dims=get_dimensions(blueprint, strategy, 0.7))
    assert list(shape) == ["layers", "delta_heads", "expert_ffn", "hidden"]
    assert share(blueprint, shape) == pytest.approx(0.7, rel=0.02)
    with pytest.raises(UsageError, match="'kv_heads' is no dimension that can be cut; those are layers, delta_heads"):
        fit_shape(blueprint, exact_sizes={"kv_heads": 2})
