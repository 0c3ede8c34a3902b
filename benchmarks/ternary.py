"""Ternary weights in 2 bits: bytes on disk and of the matrices, and tokens per second at batch 1 beside bf16 and int8.

The model is converted to ternary and packed in this process, without training: speed and size do not depend on what the
weights are. Each side times passes over one new token behind 128 tokens, in turn. The blocks are all weights but
embedding and head, which are not ternary.

    python benchmarks/ternary.py --json
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.decode.runner import ModelRunner
from potstill.evaluate.pass_times import time_passes
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model, import_model
from potstill.models.load import load_model
from potstill.models.saving import cast_weights
from potstill.models.weight_files import count_bytes_on_disk
from potstill.transforms.convert.registry import parse_conversion
from setting.document import command_line, document, parse_arguments, refuse_on_red

RESTS_ON = ["tests/ops/test_ternary.py", "tests/decode/test_native_ternary.py"]
SIZE_GOAL = "the packed blocks at most 1/6 of bf16's"
SPEED_GOAL = "packed tokens/s at least bf16's"
ROUNDS = 3


def main() -> None:
    """Refuses if a test fails, packs the model, measures both forms, prints one document."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2", help="the model (default smollm2)")
    options = parse_arguments(parser)
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    loaded = load_model(options.model, dtype=torch.bfloat16)
    backbone = import_model(loaded.model)
    for conversion in ("ternary", "packed_ternary"):
        backbone, _ = parse_conversion(conversion).convert(backbone, [])
    dense, packed = loaded.model.eval(), export_model(backbone, loaded.model).eval()
    disk = {"bf16": measure_disk(dense), "packed": measure_disk(packed)}
    blocks = {"bf16": count_block_bytes(import_model(dense)), "packed": count_block_bytes(backbone)}
    rates = measure_rates(dense, packed, loaded.vocabulary)
    figures: dict[str, Any] = {
        "bytes on disk": disk,
        "bytes of the blocks": blocks,
        "share on disk": disk["packed"] / disk["bf16"],
        "share of the blocks": blocks["packed"] / blocks["bf16"],
        "tokens per second": rates,
        "times bf16": {side: rate / rates["bf16"] for side, rate in rates.items()},
    }
    met = {SIZE_GOAL: blocks["packed"] * 6 <= blocks["bf16"], SPEED_GOAL: rates["packed"] >= rates["bf16"]}
    print(document("ternary", figures, met))


def measure_disk(model: PreTrainedModel) -> int:
    """Bytes of the weight files."""
    with tempfile.TemporaryDirectory() as folder:
        with cast_weights(model, torch.bfloat16):
            model.save_pretrained(folder)
        return count_bytes_on_disk(Path(folder))


def count_block_bytes(backbone: Backbone) -> int:
    """Bytes of all weights but embedding and head; packed codes stay bytes."""
    weights = {name: weight for name, weight in backbone.state_dict().items() if name.startswith("layers.")}
    return sum(weight.nbytes for weight in weights.values())


def measure_rates(dense: PreTrainedModel, packed: PreTrainedModel, vocabulary: int) -> dict[str, float]:
    """New tokens per second of each side: from the median pass of each round, the median round."""
    sides = {"bf16": (dense, False), "int8": (dense, True)}
    sides |= {"packed": (packed, False), "packed, int8 head": (packed, True)}
    runners = {
        name: ModelRunner(model, vocabulary=vocabulary, quantize=quantize) for name, (model, quantize) in sides.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            seconds[name].append(time_passes(runner, range(5, 133), (1,), runs=16)[1])
    return {name: 1 / sorted(values)[len(values) // 2] for name, values in seconds.items()}


if __name__ == "__main__":
    main()
