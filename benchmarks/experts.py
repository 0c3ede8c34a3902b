"""What a feed-forward of experts costs: tokens per second by the number of experts and of active ones.

One feed-forward of SmolLM2-135M's size (width 576, 1,536 neurons) reads 1,024 random tokens, forward alone and forward
with backward. Beside 2, 4 and 8 experts, of which a token computes one or two: the dense feed-forward, a dense one of
twice the width (as many active neurons as two experts), and Mixtral's block of transformers with the same sizes, in its
default form and in its plain one. Every round times each form once, so that ratios are of the same minute.

    python benchmarks/experts.py --json
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from potstill.core.blueprint import Rotary
from potstill.core.parts import FeedForward
from potstill.layers.ffn.experts import Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory
from setting.document import command_line, document, refuse_on_red

RESTS_ON = ["tests/ops/test_routing.py", "tests/layers/ffn/test_experts.py"]
HIDDEN, WIDTH, TOKENS = 576, 1536, 1024
COUNTS = ((2, 1), (4, 1), (8, 1), (4, 2), (8, 2))  # experts, and active ones
MOST = 1.25
GOAL = f"8 experts take at most {MOST} times the time of a dense feed-forward with as many active neurons"
Form = Callable[[Tensor], Tensor]


def main() -> None:
    """Refuses if a test fails, measures, and prints one document."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="times that each form is measured")
    options = parser.parse_args()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    torch.manual_seed(0)
    forms = build_forms()
    passes = {"forward": False, "forward + backward": True}
    figures = {name: measure(forms, options.rounds, backward=backward) for name, backward in passes.items()}
    met = {}
    for name, rates in figures.items():
        for k, dense in ((1, "dense"), (2, "dense, twice the width")):
            met[f"{GOAL}: {name}, {k} active"] = rates[dense] <= MOST * rates[f"8 experts, {k} active"]
    print(document("experts", {"tokens per second": figures, "active and stored neurons": count_neurons()}, met))


def build_forms() -> dict[str, Form]:
    """Every form by its name."""
    forms = {"dense": build_ours(SwiGLU(WIDTH)), "dense, twice the width": build_ours(SwiGLU(2 * WIDTH))}
    for count, k in COUNTS:
        forms[f"{count} experts, {k} active"] = build_ours(Experts(SwiGLU(WIDTH), count, k))
        for implementation in ("grouped_mm", "eager") if count == 8 else ():
            name = f"transformers ({implementation}), {count} experts, {k} active"
            forms[name] = build_mixtral(count, k, implementation)
    return forms


def build_ours(facts: FeedForward) -> Form:
    """A feed-forward of potstill."""
    module = PartFactory(HIDDEN, partial(RMSNorm, eps=1e-5)).make_part(facts)
    return partial(_call, module, Positions(torch.arange(TOKENS)[None], Rotary(), TOKENS))


def build_mixtral(count: int, k: int, implementation: str) -> Form:
    """Mixtral's block with the same sizes."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=count, num_experts_per_tok=k)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.02)
    return block


def measure(forms: dict[str, Form], rounds: int, *, backward: bool) -> dict[str, int]:
    """Tokens per second of each form, the median over rounds after one that does not count."""
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=backward)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    with torch.set_grad_enabled(backward):
        for _ in range(rounds + 1):
            for name, form in forms.items():
                start = time.perf_counter()
                y = form(x)
                if backward:
                    y.sum().backward()
                seconds[name].append(time.perf_counter() - start)
    return {name: round(TOKENS / statistics.median(times[1:])) for name, times in seconds.items()}


def count_neurons() -> dict[str, list[int]]:
    """Neurons that a token computes, and those that are stored."""
    return {f"{count} experts, {k} active": [k * WIDTH, count * WIDTH] for count, k in COUNTS}


def _call(module: nn.Module, positions: Positions, x: Tensor) -> Tensor:
    y: Tensor = module(x, positions)
    return y


if __name__ == "__main__":
    main()
