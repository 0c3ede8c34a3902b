"""The sizes of an elastic SmolLM2: speed of reading and writing, bytes, and quality before any training.

Each size is a view of one set of weights in bf16, and decodes with potstill's loop. Rates are medians; the sizes take
turns, and with each its copy, a model with weights of its own. Prompts have 256 tokens. The bits per byte are those of
held-out documents. A folder in `--out` is not converted again.

    python benchmarks/elastic.py --json --out runs
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.core.elastic import format_share
from potstill.decode.runner import ModelRunner
from potstill.evaluate.pass_times import time_steps
from potstill.evaluate.size import count_blueprint_parameters, count_state_bytes
from potstill.models.elastic import copy_size, get_sizes, slice_model
from potstill.models.families.registry import read_blueprint
from potstill.models.load import load_model
from potstill.stages.convert import ConvertConfig
from potstill.stages.measure import MeasureConfig
from setting.document import command_line, document, parse_arguments, refuse_on_red

RESTS_ON = ["tests/transforms/test_elastic.py", "tests/models/test_elastic.py", "tests/decode/test_elastic_engine.py"]
PROMPT_TOKENS, BATCHES = 256, (1, 16)
FASTER_GOAL = "each smaller size writes faster than the one before it"
VIEW_GOAL = "a view writes at 0.95 of the speed of its copy or more"


def main() -> None:
    """Converts what `--out` lacks, measures every size, and prints one document."""
    options = parse_options()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    figures = {dims: measure_model(convert(dims, options), options) for dims in options.dims}
    met = {}
    for dims, sizes in figures.items():
        rates = [size["tokens per second"]["1"] for size in sizes.values()]
        met[f"{dims}: {FASTER_GOAL}"] = rates == sorted(rates)
        met[f"{dims}: {VIEW_GOAL}"] = all(size["share of its copy's speed"] >= 0.95 for size in sizes.values())
    print(document("elastic", figures, met))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2", help="the model (default smollm2)")
    parser.add_argument("--dims", nargs="+", default=["depth", "width"], help="what smaller sizes have less of")
    parser.add_argument("--calibration-tokens", type=int, default=1024, help="text of the conversion (default 1024)")
    parser.add_argument("--data", default="docstrings", help="the text (default docstrings)")
    parser.add_argument("--documents", type=int, default=20, help="documents of the bits per byte (default 20)")
    parser.add_argument("--runs", type=int, default=8, help="times to measure (default 8)")
    parser.add_argument("--out", type=Path, default=Path("out/elastic"), help="folder of the converted models")
    return parse_arguments(parser)


def convert(dims: str, options: argparse.Namespace) -> Path:
    """The folder of the elastic model, which is converted once."""
    folder: Path = options.out / dims
    if not (folder / "card.json").exists():
        config = ConvertConfig(
            model=options.model,
            to=f"elastic:dims={dims}",
            data=options.data,
            calibration_tokens=options.calibration_tokens,
        )
        config.run(folder, overwrite=True)
    return folder


def measure_model(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each size, by its share."""
    loaded = load_model(folder, dtype=torch.bfloat16)
    shares = [size.share for size in get_sizes(loaded.model)]
    start = time.perf_counter()
    views = [slice_model(loaded.model, share) for share in shares]
    slice_seconds = (time.perf_counter() - start) / len(shares)
    models = [*views, *(copy_size(loaded.model, share) for share in shares)]
    prefills, steps = measure_times(models, loaded.vocabulary, options.runs)
    bits = measure_bits([f"{folder}#{format_share(share)}" for share in shares], options)
    figures = {}
    for n, share in enumerate(shares):
        blueprint, seconds = read_blueprint(views[n].config), steps[n]
        parameters = count_blueprint_parameters(blueprint).total
        figures[format_share(share)] = {
            "parameters": parameters,
            "bytes of the weights": 2 * parameters,
            "bytes of keys and values per token": count_state_bytes(blueprint, 1),
            "prompt tokens per second": PROMPT_TOKENS / prefills[n],
            "tokens per second": {str(batch): batch / seconds[batch] for batch in BATCHES},
            "share of its copy's speed": steps[n + len(shares)][1] / seconds[1],
            "seconds to slice": slice_seconds,
            "bits per byte": bits[n],
        }
    return figures


def measure_times(
    models: Sequence[PreTrainedModel], vocabulary: int, runs: int
) -> tuple[list[float], list[dict[int, float]]]:
    """The median seconds in which each model reads a prompt, and those of a step by the number of texts."""
    runners = [ModelRunner(model, vocabulary=vocabulary, slots=max(BATCHES), context=512) for model in models]
    prompt = list(range(5, 5 + PROMPT_TOKENS))
    prefills: list[list[float]] = [[] for _ in models]
    steps: list[list[dict[int, float]]] = [[] for _ in models]
    for number in range(runs + 1):
        for n, runner in enumerate(runners):
            start = time.perf_counter()
            runner.prefill(0, prompt)
            if number:  # the first one warms up
                prefills[n].append(time.perf_counter() - start)
                steps[n].append(time_steps(runner, prompt[:32], BATCHES, runs=4))
            runner.free(0)
    medians = [
        {batch: statistics.median(times[batch] for times in model_steps) for batch in BATCHES} for model_steps in steps
    ]
    return [statistics.median(seconds) for seconds in prefills], medians


def measure_bits(names: Sequence[str], options: argparse.Namespace) -> list[float]:
    """Bits per byte of each model on held-out documents."""
    config = MeasureConfig(
        models=tuple(names), data=options.data, documents=options.documents, speed=False, context=512
    )
    measures = config.run()["models"]
    return [next(m["value"] for m in measures[name] if m["name"] == "bits_per_byte") for name in names]


if __name__ == "__main__":
    main()
