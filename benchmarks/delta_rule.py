"""The gated delta rule beside transformers' torch fallback, and its growth with the length beside attention.

Both sides compute outputs and all gradients for 2048 tokens and 8 heads of 64 in float32, in turn in one process. The
fallback is `torch_chunk_gated_delta_rule` of Qwen3-Next, which runs where flash-linear-attention does not. Growth is
the time of a forward pass of up to `--longest` tokens, beside torch's causal attention of as many heads.

    python benchmarks/delta_rule.py --json --chart growth.png
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from potstill.ops.delta_rule import chunked
from setting.document import command_line, document, parse_arguments, refuse_on_red

RESTS_ON = ["tests/ops/test_delta_rule.py"]
LENGTH, HEADS, WIDTH = 2048, 8, 64
GOAL = "forward and backward 3 times as fast as the fallback or more"
LINEAR_GOAL = "the time per token at the longest text 1.5 times that of 2048 tokens or less"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    """Refuses if a test fails, measures both sides and the growth, prints one document."""
    options = parse_options()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    milliseconds = compare(options.repeats)
    growth = measure_growth(options.longest)
    if options.chart:
        draw_growth(growth, options.chart)
    ratios = {name: values["transformers"] / values["potstill"] for name, values in milliseconds.items()}
    per_token = {length: seconds / length for length, seconds in growth["delta rule"].items()}
    met = {GOAL: ratios["forward and backward"] >= 3}
    met[LINEAR_GOAL] = per_token[max(per_token)] <= 1.5 * per_token[min(per_token)]
    figures = {"milliseconds": milliseconds, "times faster": ratios, "seconds of a forward pass": growth}
    print(document("delta_rule", figures, met))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each side (default 7)")
    parser.add_argument("--longest", type=int, default=65536, help="tokens of the longest text (default 65536)")
    parser.add_argument("--chart", type=Path, help="a picture of the growth, such as growth.png")
    return parse_arguments(parser)


def make_inputs(length: int) -> Inputs:
    """Random queries, keys of length 1, values, rates and gates, which take gradients."""
    shape = (1, length, HEADS)
    q, k, v = (torch.randn(*shape, WIDTH) for _ in range(3))
    tensors = (q, normalize(k, dim=-1), v, torch.rand(shape), -0.1 * torch.rand(shape))
    return tuple(x.requires_grad_() for x in tensors)  # type: ignore[return-value]


def run_potstill(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    """Ours."""
    return chunked(q, k, v, beta, gate=gate)[0]


def run_transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    """The fallback."""
    y: Tensor = torch_chunk_gated_delta_rule(q, k, v, gate, beta)[0]
    return y


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention."""
    y: Tensor = scaled_dot_product_attention(q, k, v, is_causal=True)
    return y


SIDES: Mapping[str, Callable[..., Tensor]] = {"potstill": run_potstill, "transformers": run_transformers}


def compare(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each side, forward and with the backward: the medians of runs in turn after one that warms up."""
    inputs, slope = make_inputs(LENGTH), torch.randn(1, LENGTH, HEADS, WIDTH)
    forward: dict[str, list[float]] = {name: [] for name in SIDES}
    both: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(repeats + 1):
        for name, run in SIDES.items():
            start = time.perf_counter()
            y = run(*inputs)
            middle = time.perf_counter()
            torch.autograd.grad(y, inputs, slope)
            both[name].append(time.perf_counter() - start)
            forward[name].append(middle - start)
    times = {"forward": forward, "forward and backward": both}
    return {
        kind: {name: 1e3 * statistics.median(runs[1:]) for name, runs in sides.items()} for kind, sides in times.items()
    }


@torch.no_grad()
def measure_growth(longest: int) -> dict[str, dict[int, float]]:
    """Seconds of a forward pass of both, by the number of tokens; the better of two runs up to 16k tokens."""
    seconds: dict[str, dict[int, float]] = {"delta rule": {}, "attention": {}}
    length = LENGTH
    while length <= longest:
        q, k, v, beta, gate = make_inputs(length)
        heads = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        passes: dict[str, Callable[[], Tensor]] = {
            "delta rule": partial(run_potstill, q, k, v, beta, gate),
            "attention": partial(attend, *heads),
        }
        for name, run in passes.items():
            runs = []
            for _ in range(2 if length <= 16384 or name == "delta rule" else 1):
                start = time.perf_counter()
                run()
                runs.append(time.perf_counter() - start)
            seconds[name][length] = min(runs)
        length *= 2
    return seconds


def draw_growth(growth: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """A picture of the growth; both axes are logarithmic."""
    from matplotlib.figure import Figure

    from potstill.evaluate.charts.style import style_panel

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    style_panel(panel)
    for name, seconds in growth.items():
        panel.plot([*seconds], [*seconds.values()], marker="o", label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens")
    panel.set_ylabel("seconds of a forward pass")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
