"""The architectures of GGUF that express a blueprint, and their hyperparameters.

llama.cpp reads Llama, Mistral and similar models as `llama`, and layers of several widths as `deci`. It reads Qwen2,
Qwen3 and Gemma 3 by their own names. What each expresses stands in its `src/models/*.cpp`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, RopeScalingType

from potstill.core.blueprint import Blueprint, Rotary
from potstill.core.errors import UnsupportedModel
from potstill.layers.rotary import frequencies
from potstill.models.families.gemma import GEMMA3
from potstill.models.families.llama import LLAMA, list_attentions, list_ffns

EXPRESSIBLE = "GGUF files hold the shapes of Llama, Mistral, Qwen2, Qwen3 and Gemma 3"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
GEMMA_PERIOD = 6  # by default, each sixth layer of Gemma 3 has no window
LARGE_GEMMA_LAYERS = 62  # llama.cpp knows the 27B model by them, and its scale of attention is another one
YARN_FIELDS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}


@dataclass(frozen=True)
class Architecture:
    """An architecture of GGUF: its id, its names of Hugging Face's parts, and what it can express.

    `rotates_neighbors`: it rotates dimensions 2j and 2j + 1 of a head, so rows of q and k change places. With
    `has_factors` it reads a factor for each frequency. `has_windows`: some of its layers may see a window alone.
    """

    id: MODEL_ARCH
    part_names: Mapping[str, str]
    find_obstacles: Callable[[Blueprint], Iterator[str]]
    activation: str = "silu"
    rotates_neighbors: bool = False
    has_factors: bool = False
    has_windows: bool = False
    scales_embedding: bool = False

    def get_embedding_scale(self, hidden: int) -> float:
        """The factor on the embedding, which llama.cpp multiplies by itself."""
        return hidden**0.5 if self.scales_embedding else 1.0


def find_architecture(blueprint: Blueprint) -> Architecture:
    """The architecture that expresses `blueprint` exactly.

    A factor on the embedding counts as expressed, since the weights can take it.

    Raises: UnsupportedModel, with what GGUF does not express.
    """
    if not blueprint.kinds() <= LLAMA.kinds:
        layers = sorted({layer.describe() for layer in blueprint.layers})
        raise UnsupportedModel(f"GGUF has no layers of {' or '.join(layers)}; {EXPRESSIBLE}")
    architecture = _choose_architecture(blueprint)
    obstacle = next(_find_common_obstacles(blueprint, architecture), None)
    obstacle = obstacle or next(architecture.find_obstacles(blueprint), None)
    if obstacle:
        raise UnsupportedModel(f"GGUF cannot express {obstacle}; {EXPRESSIBLE}, and --to hf keeps any model")
    return architecture


def _choose_architecture(blueprint: Blueprint) -> Architecture:
    mixer = list_attentions(blueprint)[0]
    if any(layer.post_norms for layer in blueprint.layers):
        return GEMMA3_GGUF
    if mixer.qk_norm:
        return QWEN3_GGUF
    if not has_equal_widths(blueprint):
        return DECI_GGUF
    is_qwen2 = blueprint.get_extra("family") == "qwen2" and mixer.heads * mixer.head_dim == blueprint.hidden
    return QWEN2_GGUF if is_qwen2 and mixer.qkv_bias and not mixer.out_bias else LLAMA_GGUF


def has_equal_widths(blueprint: Blueprint) -> bool:
    """Whether all layers have as many heads and neurons as the first one."""
    pairs = zip(list_attentions(blueprint), list_ffns(blueprint), strict=True)
    return len({(mixer.heads, mixer.kv_heads, ffn.width) for mixer, ffn in pairs}) == 1


def _find_common_obstacles(blueprint: Blueprint, architecture: Architecture) -> Iterator[str]:
    mixers, ffns = list_attentions(blueprint), list_ffns(blueprint)
    features = {(m.head_dim, m.qkv_bias, m.out_bias, m.qk_norm, m.scale) for m in mixers}
    if len(features) > 1 or len({(f.bias, f.activation) for f in ffns}) > 1:
        yield "layers with different biases, norms, scales or widths of a head"
    if len({layer.post_norms for layer in blueprint.layers}) > 1:
        yield "layers of which only some normalize their outputs"
    if architecture is not DECI_GGUF and not has_equal_widths(blueprint):
        yield f"{architecture.id.name.lower()} layers with different numbers of heads or neurons"
    if ACTIVATIONS.get(ffns[0].activation) != architecture.activation:
        yield f"the activation {ffns[0].activation} in such layers"
    if blueprint.logit_softcap is not None and architecture is not GEMMA3_GGUF:
        yield "a soft cap on the logits of such a model"
    yield from _find_rotary_obstacles(blueprint.rotary, architecture)


def _find_rotary_obstacles(rotary: Rotary, architecture: Architecture) -> Iterator[str]:
    parameters = rotary.parameters()
    kind = parameters["rope_type"]
    if rotary.fraction != 1:
        yield "rotary positions of a part of each head"
    if kind not in ("default", "linear", "yarn", "llama3") or (kind == "llama3" and not architecture.has_factors):
        yield f"rotary scaling of the kind {kind} in such a model"
    if kind == "yarn" and (extra := sorted(set(parameters) - YARN_FIELDS)):
        yield f"YaRN with {extra[0]}"


def _find_llama_obstacles(blueprint: Blueprint) -> Iterator[str]:
    mixers = list_attentions(blueprint)
    if any(mixer.scale is not None for mixer in mixers):
        yield "attention with a scale of its own"
    if any(mixer.rotary is not None for mixer in mixers):
        yield "two rotations in such a model"


def _find_qwen2_obstacles(blueprint: Blueprint) -> Iterator[str]:
    yield from _find_llama_obstacles(blueprint)
    if list_ffns(blueprint)[0].bias:
        yield "biases of neurons in a Qwen2"


def _find_qwen3_obstacles(blueprint: Blueprint) -> Iterator[str]:
    yield from _find_llama_obstacles(blueprint)
    if list_attentions(blueprint)[0].out_bias or list_ffns(blueprint)[0].bias:
        yield "biases of outputs in a model with normalized heads"


def _find_gemma_obstacles(blueprint: Blueprint) -> Iterator[str]:
    mixers, ffns = list_attentions(blueprint), list_ffns(blueprint)
    mixer = mixers[0]
    if not mixer.qk_norm or mixer.out_bias or ffns[0].bias:
        yield "normalized outputs with biases, or without normalized heads"
    is_large = len(mixers) == LARGE_GEMMA_LAYERS
    scale = (blueprint.hidden // mixer.heads) ** -0.5 if is_large else mixer.head_dim**-0.5
    if abs(mixer.softmax_scale - scale) > 1e-9:
        yield "this scale of attention in a Gemma 3 of this depth"
    windows = {(m.window, m.rotary) for m in mixers}
    sliding = {entry for entry in windows if entry[0] is not None}
    if len(sliding) > 1 or windows - sliding - {(None, None)}:
        yield "layers with several windows or rotations"
    if any(rotary is not None and rotary.scaling for _, rotary in sliding):
        yield "a scaled rotation inside a window"


LLAMA_GGUF = Architecture(
    MODEL_ARCH.LLAMA, LLAMA.part_names, _find_llama_obstacles, rotates_neighbors=True, has_factors=True
)
DECI_GGUF = Architecture(
    MODEL_ARCH.DECI, LLAMA.part_names, _find_llama_obstacles, rotates_neighbors=True, has_factors=True
)
QWEN2_GGUF = Architecture(MODEL_ARCH.QWEN2, LLAMA.part_names, _find_qwen2_obstacles)
QWEN3_GGUF = Architecture(MODEL_ARCH.QWEN3, LLAMA.part_names, _find_qwen3_obstacles)
GEMMA3_GGUF = Architecture(
    MODEL_ARCH.GEMMA3,
    GEMMA3.part_names,
    _find_gemma_obstacles,
    activation="gelu",
    has_windows=True,
    scales_embedding=True,
)


def get_context(blueprint: Blueprint, architecture: Architecture) -> int:
    """The positions in which llama.cpp computes the same as the model: its context, or a window that it ignores."""
    windows = [mixer.window for mixer in list_attentions(blueprint) if mixer.window is not None]
    return blueprint.context if architecture.has_windows else min([blueprint.context, *windows])


def write_hyperparameters(writer: Any, blueprint: Blueprint, architecture: Architecture) -> None:
    """Add the shape of the model to a `GGUFWriter`."""
    mixers, ffns = list_attentions(blueprint), list_ffns(blueprint)
    is_deci = architecture is DECI_GGUF
    writer.add_block_count(len(mixers))
    writer.add_context_length(get_context(blueprint, architecture))
    writer.add_embedding_length(blueprint.hidden)
    writer.add_vocab_size(blueprint.vocabulary)
    writer.add_feed_forward_length([ffn.width for ffn in ffns] if is_deci else ffns[0].width)
    writer.add_head_count([mixer.heads for mixer in mixers] if is_deci else mixers[0].heads)
    writer.add_head_count_kv([mixer.kv_heads for mixer in mixers] if is_deci else mixers[0].kv_heads)
    writer.add_key_length(mixers[0].head_dim)
    writer.add_value_length(mixers[0].head_dim)
    writer.add_rope_dimension_count(mixers[0].head_dim)
    writer.add_layer_norm_rms_eps(blueprint.norm_eps)
    _write_rotary(writer, blueprint.rotary)
    if architecture.has_windows:
        _write_windows(writer, blueprint)
    if blueprint.logit_softcap is not None:
        writer.add_final_logit_softcapping(blueprint.logit_softcap)


def _write_rotary(writer: Any, rotary: Rotary) -> None:
    parameters = rotary.parameters()
    writer.add_rope_freq_base(rotary.theta)
    if parameters["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        return
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(parameters.get("beta_fast", 32))
    writer.add_rope_scaling_yarn_beta_slow(parameters.get("beta_slow", 1))


def _write_windows(writer: Any, blueprint: Blueprint) -> None:
    """The window, its rotation, and which layers have it, where that is not each but every sixth."""
    mixers = list_attentions(blueprint)
    sliding = next((mixer for mixer in mixers if mixer.window is not None), None)
    if sliding is None:
        return
    writer.add_sliding_window(sliding.window)
    writer.add_rope_freq_base_swa((sliding.rotary or blueprint.rotary).theta)
    pattern = [mixer.window is not None for mixer in mixers]
    if pattern != [(index + 1) % GEMMA_PERIOD != 0 for index in range(len(mixers))]:
        writer.add_sliding_window_pattern(pattern)


def compute_rotary_factors(blueprint: Blueprint) -> list[float]:
    """What divides each frequency of the unscaled rotation, for Llama 3's scaling; empty for others."""
    if blueprint.rotary.parameters()["rope_type"] != "llama3":
        return []
    head_dim = list_attentions(blueprint)[0].head_dim
    scaled, _ = frequencies(blueprint.rotary, head_dim=head_dim, context=blueprint.context)
    plain, _ = frequencies(Rotary(blueprint.rotary.theta), head_dim=head_dim, context=blueprint.context)
    return [a / b for a, b in zip(plain, scaled, strict=True)]
