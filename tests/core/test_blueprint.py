"""A blueprint is a value: it compares, hashes, travels as JSON, refuses nonsense, and knows every weight's shape."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.blueprint import Blueprint, Layer, Rotary, weight_shapes
from potstill.core.errors import ArtifactError, UsageError
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone


def attention(groups: int, share: int, half: int, *rest: Any) -> dict[str, Any]:
    names = ("qkv_bias", "out_bias", "qk_norm", "window", "scale", "rotary")
    sizes = {"kind": "attention", "heads": groups * share, "kv_heads": groups, "head_dim": 2 * half}
    return sizes | dict(zip(names, rest, strict=True))


SMALLEST, FLAG = st.integers(1, 3), st.booleans()
SCALING = st.sampled_from([None, {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0, 2.0]}])
ROTARY = st.fixed_dictionaries({"theta": st.floats(1.0, 1e6), "scaling": SCALING})
POSITIVE = st.none() | st.floats(0.1, 9)
WINDOWS = st.none() | st.integers(1, 9)
MIXERS = st.builds(attention, SMALLEST, SMALLEST, SMALLEST, FLAG, FLAG, FLAG, WINDOWS, POSITIVE, st.none() | ROTARY)
FFNS = st.fixed_dictionaries({"kind": st.just("swiglu"), "width": st.integers(1, 9), "bias": FLAG})
LAYERS = st.lists(st.fixed_dictionaries({"mixer": MIXERS, "ffn": FFNS, "post_norms": FLAG}), min_size=1, max_size=3)
# data and no values: beartype draws random numbers when it looks into a tuple, which a strategy must not
DATA = st.fixed_dictionaries(
    {
        "vocabulary": st.integers(1, 20),
        "hidden": st.integers(1, 20),
        "layers": LAYERS,
        "rotary": ROTARY,
        "tied": FLAG,
        "embedding_scale": st.floats(0.1, 99),
        "zero_centred_norms": FLAG,
        "logit_softcap": POSITIVE,
        "extras": st.sampled_from([{}, {"eos_token_id": [1, 2], "family": "llama"}]),
    }
)


SMALL = Blueprint(20, 8, (Layer(Attention(4, 2, 4), SwiGLU(12)),) * 3)


@settings(max_examples=50)
@given(DATA)
def test_a_blueprint_survives_json(data: dict[str, Any]) -> None:
    blueprint = Blueprint.from_dict(data)
    written = json.loads(json.dumps(blueprint.to_dict()))
    again = Blueprint.from_dict(written)
    assert again == blueprint
    assert hash(again) == hash(blueprint)
    assert all(written[name] == value for name, value in data.items() if name != "layers")


@settings(max_examples=50)
@given(DATA)
def test_shapes_are_those_of_the_network_s_state_dict_in_the_same_order(data: dict[str, Any]) -> None:
    blueprint = Blueprint.from_dict(data)
    with torch.device("meta"):
        state = Backbone(blueprint).state_dict()
    assert list(weight_shapes(blueprint).items()) == [(name, tuple(weight.shape)) for name, weight in state.items()]


def test_the_shapes_of_a_small_model_are_these() -> None:
    blueprint = replace(SMALL, layers=SMALL.layers[:1])
    assert weight_shapes(blueprint) == {
        "embed.weight": (20, 8),
        "layers.0.mixer_norm.weight": (8,),
        "layers.0.mixer.q.weight": (16, 8),
        "layers.0.mixer.k.weight": (8, 8),
        "layers.0.mixer.v.weight": (8, 8),
        "layers.0.mixer.o.weight": (8, 16),
        "layers.0.ffn_norm.weight": (8,),
        "layers.0.ffn.gate.weight": (12, 8),
        "layers.0.ffn.up.weight": (12, 8),
        "layers.0.ffn.down.weight": (8, 12),
        "norm.weight": (8,),
        "head.weight": (20, 8),
    }
    assert "head.weight" not in weight_shapes(replace(blueprint, tied=True))


def test_post_norms_are_two_more_a_layer_after_each_half() -> None:
    layer = replace(SMALL.layers[0], post_norms=True)
    norms = [name for name in weight_shapes(replace(SMALL, layers=(layer,))) if "norm" in name]
    assert norms == [
        "layers.0.mixer_norm.weight",
        "layers.0.mixer_post_norm.weight",
        "layers.0.ffn_norm.weight",
        "layers.0.ffn_post_norm.weight",
        "norm.weight",
    ]
    assert {f"layers.0.{name}.weight" for name in layer.norm_names()} == set(norms[:-1])


def test_a_blueprint_written_before_there_were_further_facts_still_reads() -> None:
    data = SMALL.to_dict()
    for name in ("embedding_scale", "zero_centred_norms", "logit_softcap"):
        del data[name]
    for layer in data["layers"]:
        del layer["post_norms"], layer["mixer"]["scale"], layer["mixer"]["rotary"]
    assert Blueprint.from_dict(data) == SMALL


def test_the_scale_of_attention_is_one_over_the_root_of_the_head_unless_it_is_said() -> None:
    assert Attention(4, 2, 16).softmax_scale == 0.25
    assert Attention(4, 2, 16, scale=0.1).softmax_scale == 0.1


def test_at_changes_the_layers_asked_for_and_leaves_the_old_blueprint() -> None:
    new = SMALL.change_layers(lambda i: i > 0, lambda layer: replace(layer, ffn=SwiGLU(5)))
    assert [layer.ffn.width for layer in new.layers] == [12, 5, 5]
    assert [layer.ffn.width for layer in SMALL.layers] == [12, 12, 12]


def test_extras_are_added_and_replaced_by_name() -> None:
    changed = SMALL.update_extras({"a": 1, "b": [2]}).update_extras({"a": 3})
    assert changed.get_extra("a") == 3
    assert changed.get_extra("b") == (2,)
    assert changed.get_extra("c", 7) == 7


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Attention(5, 2, 4), "heads 5 is not a multiple of kv_heads 2"),
        (lambda: Attention(4, 0, 4), "kv_heads is 0"),
        (lambda: Attention(4, 2, 3), "head_dim 3 is odd"),
        (lambda: Attention(4, 2, 4, window=0), "window is 0"),
        (lambda: SwiGLU(-2), "width is -2"),
        (lambda: SwiGLU(True), "width is True"),
        (lambda: Rotary(0.0), "theta is 0.0"),
        (lambda: replace(SMALL, layers=()), "keep at least one"),
        (lambda: replace(SMALL, norm_eps=0.0), "norm_eps is 0.0"),
        (lambda: replace(SMALL, vocabulary=-1), "vocabulary is -1"),
        (lambda: Attention(4, 2, 4, scale=0.0), "scale of attention is 0.0"),
        (lambda: replace(SMALL, embedding_scale=-1.0), "embedding_scale is -1.0"),
        (lambda: replace(SMALL, logit_softcap=0.0), "logit_softcap is 0.0"),
    ],
)
def test_nonsense_is_refused_with_the_value_that_is_wrong(make, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data | {"depth": 3}, "Blueprint has no depth"),
        (lambda data: {k: v for k, v in data.items() if k != "hidden"}, "Blueprint lacks hidden"),
        (lambda data: data | {"layers": [{"mixer": {"kind": "mamba"}, "ffn": {}}]}, "unknown kind 'mamba'"),
        (lambda data: data | {"layers": [{"mixer": {}, "ffn": {}}]}, "a Mixer in a blueprint has no kind"),
        (lambda data: data | {"layers": [{"mixer": {}}]}, "Layer lacks ffn"),
        (lambda data: data | {"rotary": {"base": 1}}, "Rotary has no base"),
    ],
)
def test_a_foreign_blueprint_is_refused_and_the_key_is_named(spoil, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        Blueprint.from_dict(spoil(SMALL.to_dict()))


def test_a_key_unknown_inside_a_layer_is_named() -> None:
    data = SMALL.to_dict()
    data["layers"][0]["mixer"]["sinks"] = 4
    with pytest.raises(ArtifactError, match="Attention has no sinks"):
        Blueprint.from_dict(data)


def test_reading_a_blueprint_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, potstill.core.blueprint as b; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
