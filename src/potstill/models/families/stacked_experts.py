"""Experts in stock families: their names, and their weights, which transformers keeps stacked.

`experts.gate_up_proj [E 2F D]` holds gate above up, and `experts.down_proj [E D F]` down, of all E experts of a layer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint
from potstill.core.parts import Linear, Part
from potstill.layers.ffn.experts import Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.llama import PART_NAMES

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_MATRICES = ("gate", "up", "down")
EXPERT_PART_NAMES = PART_NAMES | {
    "mlp.gate": "ffn.router",
    **{f"mlp.experts.*.{x}_proj": f"ffn.experts.*.{x}" for x in _MATRICES},
    **{f"mlp.shared_expert.{x}_proj": f"ffn.shared.{x}" for x in _MATRICES},
    "mlp.shared_expert_gate": "ffn.shared_gate",
}
EXPERT_KINDS: frozenset[type[Part]] = frozenset({Attention, Experts, SwiGLU, Linear})
SEPARATE_EXPERTS = "separate_experts"  # a fact of blueprints whose experts are trained one by one, so not stacked
ROUTER_EXTRAS = ("router_aux_loss_coef", "output_router_logits")  # facts of Hugging Face's own loss


def unstack_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stock state dict with a weight for each matrix of each expert; they share the memory of the stacked ones."""
    separate: dict[str, Tensor] = {}
    for name, weight in state.items():
        prefix = name.rpartition(".")[0]
        if name.endswith(GATE_UP):
            for i, expert in enumerate(weight):
                gate, up = expert.chunk(2)
                separate |= {f"{prefix}.{i}.gate_proj.weight": gate, f"{prefix}.{i}.up_proj.weight": up}
        elif name.endswith(DOWN):
            separate |= {f"{prefix}.{i}.down_proj.weight": expert for i, expert in enumerate(weight)}
        else:
            separate[name] = weight
    return separate


def stack_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stock state dict that `unstack_experts` took apart."""
    stacked: dict[str, Tensor] = {}
    matrices_by_layer: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, weight in state.items():
        layer, _, suffix = name.partition(".mlp.experts.")
        if not suffix:
            stacked[name] = weight
            continue
        index, matrix, _ = suffix.split(".")
        matrices_by_layer.setdefault(layer, {}).setdefault(matrix, {})[int(index)] = weight
    for layer, matrices in matrices_by_layer.items():
        gate, up, down = ([weight for _, weight in sorted(matrices[f"{x}_proj"].items())] for x in _MATRICES)
        stacked[f"{layer}.{GATE_UP}"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        stacked[f"{layer}.{DOWN}"] = torch.stack(down)
    return stacked


def list_experts(blueprint: Blueprint) -> tuple[Experts, ...]:
    """The feed-forwards of a blueprint that have experts."""
    return tuple(layer.ffn for layer in blueprint.layers if isinstance(layer.ffn, Experts))


def has_plain_experts(blueprint: Blueprint) -> bool:
    """Whether all experts of all layers that have some may be stacked: equal gated feed-forwards without bias."""
    experts = set(list_experts(blueprint))
    is_stacked = not blueprint.get_extra(SEPARATE_EXPERTS, False)
    return is_stacked and len(experts) == 1 and all(isinstance(e.expert, SwiGLU) and not e.expert.bias for e in experts)
