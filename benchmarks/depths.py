"""Mixture of depths: the time and the cache bytes saved beside the operations saved, at loads of 1 to 0.25.

A network of SmolLM2-135M's shape with random weights, in float32, and the same with gates before every second layer
(`--to depths`), whose biases let a given share of the tokens through each gated layer. `forward` is a pass over packed
documents without gradients, `decode` reads new tokens one by one behind a prompt. Both leave out the head. All loads
and the network without gates take turns in one process. `efficiency` is the share of the time that is saved over the
share of the operations that is saved, both relative to the network without gates; operations count measured loads.

    python benchmarks/depths.py --json
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.depth import EXECUTED
from potstill.core.depth_state import DepthState
from potstill.core.state import KeyValues, State
from potstill.evaluate.size import forward_flops
from potstill.layers.depth import DepthGate
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights
from potstill.transforms.convert.to_mixture_of_depths import ToMixtureOfDepths
from setting.document import command_line, document, parse_arguments, refuse_on_red

RESTS_ON = ["tests/layers/test_depth.py", "tests/transforms/test_to_mixture_of_depths.py"]
SMOLLM2 = Blueprint(1024, 576, (Layer(Attention(9, 3, 64), SwiGLU(1536)),) * 30, tied=True, context=8192)
LOADS = (1.0, 0.75, 0.5, 0.25)
DOCUMENTS, LENGTH = 2, 512
PLAIN = "no gates"
FORWARD_GOAL = "a forward saves at least 0.85 of the time that its saved operations would take, at every load below 1"
DECODE_GOAL = "decoding saves at least 0.85 of the time that its saved operations would take, at every load below 1"
OPEN_GOAL = "gates that let every token through cost at most 3 % of a forward"


def main() -> None:
    """Refuses if a test fails, measures every load, prints one document."""
    options = parse_options()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    with torch.no_grad():
        networks = build_networks()
        biases = {load: calibrate(networks[1], load) for load in LOADS}
        figures = {
            "forward": measure_forward(networks, biases, options.rounds),
            "decode": measure_decode(networks, biases, options.tokens),
        }
    forward, decode = ([figures[part][str(load)] for load in LOADS[1:]] for part in ("forward", "decode"))
    met = {
        FORWARD_GOAL: all(side["efficiency"] >= 0.85 for side in forward),
        DECODE_GOAL: all(side["efficiency"] >= 0.85 for side in decode),
        OPEN_GOAL: figures["forward"]["1.0"]["seconds"] <= 1.03 * figures["forward"][PLAIN]["seconds"],
    }
    print(document("depths", figures, met))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="forwards of each side (default 5)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens of each side (default 32)")
    return parse_arguments(parser)


def build_networks() -> tuple[Backbone, Backbone]:
    """The network without gates, and the one with gates, which shares its other weights."""
    plain = Backbone(SMOLLM2).eval()
    init_weights(plain, std=0.05, rng=torch.Generator().manual_seed(1))
    blueprint = ToMixtureOfDepths().blueprint(SMOLLM2)
    with torch.device("meta"):
        gated = Backbone(blueprint).eval()
    weights, rng = plain.state_dict(), torch.Generator().manual_seed(2)
    gates = {
        name: torch.randn(shape, generator=rng) for name, shape in weight_shapes(blueprint).items() if "depth" in name
    }
    gated.load_state_dict(weights | gates, strict=True, assign=True)
    return plain, gated


def make_text() -> tuple[Tensor, Tensor]:
    """Random ids of packed documents, and their positions."""
    ids = torch.randint(SMOLLM2.vocabulary, (1, DOCUMENTS * LENGTH), generator=torch.Generator().manual_seed(3))
    return ids, torch.arange(LENGTH).repeat(DOCUMENTS)[None]


def list_gates(network: Backbone) -> list[DepthGate]:
    """The depth gates, in the order of the layers."""
    return [module for module in network.modules() if isinstance(module, DepthGate)]


def calibrate(network: Backbone, load: float) -> list[float]:
    """The biases of the gates with which this share of the packed tokens runs through each gated layer."""

    def set_bias(gate: Any, inputs: tuple[Any, ...]) -> None:
        gate.gate.bias.zero_()
        gates, _ = gate.compute_gates(inputs[0])
        gate.gate.bias.fill_(100.0 if load == 1 else -gates.quantile(1 - load).logit().item())

    handles = [gate.register_forward_pre_hook(set_bias) for gate in list_gates(network)]
    network(*make_text())
    for handle in handles:
        handle.remove()
    return [gate.gate.bias.item() for gate in list_gates(network)]


def set_biases(network: Backbone, biases: Sequence[float]) -> None:
    """Gives each gate its bias."""
    for gate, bias in zip(list_gates(network), biases, strict=True):
        gate.gate.bias.fill_(bias)


def measure_forward(
    networks: tuple[Backbone, Backbone], biases: Mapping[float, Sequence[float]], rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds of a pass over the packed documents, measured loads and operations, of each side."""
    ids, positions = make_text()
    plain, gated = networks
    seconds: dict[str, list[float]] = {PLAIN: [], **{str(load): [] for load in LOADS}}
    loads = {PLAIN: 1.0}
    for round_number in range(rounds + 1):
        for load in (None, *LOADS):
            network, name = (plain, PLAIN) if load is None else (gated, str(load))
            if load is not None:
                set_biases(gated, biases[load])
            reports: dict[str, list[Tensor]] = {EXECUTED: []}
            taken = time_call(partial(run_layers, network, ids, positions, reports))
            if load is not None:
                loads[name] = torch.stack(reports[EXECUTED]).mean().item()
            if round_number:  # the first one warms up
                seconds[name].append(taken)
    return {name: describe_side(name, seconds, loads, (LENGTH + 1) / 2) for name in seconds}


def measure_decode(
    networks: tuple[Backbone, Backbone], biases: Mapping[float, Sequence[float]], tokens: int
) -> dict[str, dict[str, float]]:
    """Seconds of a pass over one token behind a document, its measured load, and the bytes of keys and values."""
    ids, positions = (x[:, : LENGTH + tokens] for x in (make_text()[0], torch.arange(DOCUMENTS * LENGTH)[None]))
    states = {PLAIN: networks[0].make_states()} | {str(load): networks[1].make_states() for load in LOADS}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    stored: dict[str, int] = {}
    for start, end in ((0, LENGTH), *((t, t + 1) for t in range(LENGTH, LENGTH + tokens))):
        for load in (None, *LOADS):
            network, name = (networks[0], PLAIN) if load is None else (networks[1], str(load))
            if load is not None:
                set_biases(networks[1], biases[load])
            inputs = ids[:, start:end], positions[:, start:end], states[name]
            taken = time_call(partial(network, *inputs))
            if start:
                seconds[name].append(taken)
            else:
                stored[name] = count_stored(states[name])
    gates = len(list_gates(networks[1]))
    loads = {name: (count_stored(states[name]) - stored[name]) / (tokens * gates) for name in states if name != PLAIN}
    cache = {name: float(count_bytes(states[name])) for name in states}
    sides = {name: describe_side(name, seconds, {PLAIN: 1.0, **loads}, LENGTH + tokens / 2) for name in states}
    return {
        name: side | {"cache MiB": cache[name] / 2**20, "share of cache": cache[name] / cache[PLAIN]}
        for name, side in sides.items()
    }


def describe_side(
    name: str, seconds: Mapping[str, Sequence[float]], loads: Mapping[str, float], seen: float
) -> dict[str, float]:
    """The median seconds, the load, and what of time and operations is saved."""
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    blueprint = SMOLLM2 if name == PLAIN else ToMixtureOfDepths(load=loads[name]).blueprint(SMOLLM2)
    saved_time = 1 - medians[name] / medians[PLAIN]
    saved_operations = 1 - count_operations(blueprint, seen) / count_operations(SMOLLM2, seen)
    side = {
        "seconds": medians[name],
        "load": loads[name],
        "saved time": saved_time,
        "saved operations": saved_operations,
    }
    return side | ({"efficiency": saved_time / saved_operations} if saved_operations > 0.01 else {})


def count_operations(blueprint: Blueprint, seen: float) -> float:
    """Operations of the layers for one token that sees `seen` tokens."""
    flops = forward_flops(blueprint, seen)
    return flops.blocks + flops.attention


def count_stored(states: Sequence[State]) -> int:
    """Tokens in the states of gated layers."""
    return sum(len(text.slots) for state in states if isinstance(state, DepthState) for text in state.texts)


def count_bytes(states: Sequence[State]) -> int:
    """Bytes of all keys and values."""
    layers = [text.state for state in states if isinstance(state, DepthState) for text in state.texts]
    layers += [state for state in states if not isinstance(state, DepthState)]
    tensors = (tensor for layer in layers if isinstance(layer, KeyValues) for tensor in (layer.keys, layer.values))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)  # None if no token has run


def run_layers(network: Backbone, ids: Tensor, positions: Tensor, reports: dict[str, list[Tensor]]) -> None:
    """A pass that collects `reports`."""
    for _ in network.residuals(ids, positions, reports=reports):
        pass


def time_call(job: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
