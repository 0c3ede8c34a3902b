"""Small models from scratch at equal FLOPs: transformer, DeltaNet, Gated DeltaNet, a hybrid and a MatMul-free model.

All have the same width and depth, a byte-level BPE of `--vocabulary` tokens trained on the training text, and AdamW
with the same schedule. Each reads as many tokens as give the FLOPs of the transformer's `--tokens`; a token counts
three times its forward pass. Measured are held-out bits per byte, with each seed. A trained model stays in `--out`.

    python benchmarks/from_scratch.py --json --data FOLDER --out runs --tokens 1M --seeds 1 2 3
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from setting.document import command_line, document, refuse_on_red
from setting.runs import is_finished, train_on_text
from setting.tokenizer import train_byte_tokenizer

RESTS_ON = ["tests/layers/test_laws.py", "tests/ops/test_delta_rule.py", "tests/ops/test_ternary.py"]
HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 256, 8, 4, 64, 704
CONTEXT = 512
RATES = {"matmul-free": 4e-3}  # ternary weights need a larger rate (arXiv:2406.02528, section 4)
RATE = 2e-3


def main() -> None:
    """Trains every model and seed that `--out` lacks, and prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options)
    blueprints = make_blueprints(len(tokenizer))
    flops = {name: compute_flops(blueprint) for name, blueprint in blueprints.items()}
    figures: dict[str, Any] = {}
    for name, blueprint in blueprints.items():
        tokens = int(options.tokens * flops["transformer"] / flops[name])
        runs = [train(name, blueprint, tokenizer, tokens, seed, options) for seed in options.seeds]
        bits = [run["bits_per_byte"] for run in runs]
        figures[name] = {
            "parameters": runs[0]["parameters"],
            "flops_per_token": flops[name],
            "tokens": tokens,
            "bits_per_byte": bits,
            "mean": statistics.mean(bits),
            "seconds": [run["seconds"] for run in runs],
        }
    print(document("from scratch", figures, check_order(figures)))


def make_blueprints(vocabulary: int) -> dict[str, Any]:
    """The five architectures, of equal width and depth."""
    from potstill.core.blueprint import Blueprint, Layer
    from potstill.layers.ffn.swiglu import SwiGLU
    from potstill.layers.linear.ternary import Ternary
    from potstill.layers.mixers.attention import Attention
    from potstill.layers.mixers.delta_net import DeltaNet
    from potstill.layers.mixers.mlgru import MLGRU

    ffn = SwiGLU(FFN)
    attention = Layer(Attention(HEADS, HEADS, HEAD_DIM), ffn)
    delta = Layer(DeltaNet(HEADS, HEADS, HEAD_DIM, HEAD_DIM), ffn)
    gated = Layer(DeltaNet(HEADS, HEADS, HEAD_DIM, HEAD_DIM, gated=True), ffn)
    stacks = {
        "transformer": (attention,) * LAYERS,
        "deltanet": (delta,) * LAYERS,
        "gated-deltanet": (gated,) * LAYERS,
        "hybrid": (gated, gated, gated, attention) * (LAYERS // 4),
        "matmul-free": tuple(Layer(MLGRU(HIDDEN, i / LAYERS), ffn, linear=Ternary(norm=True)) for i in range(LAYERS)),
    }
    base = Blueprint(vocabulary, HIDDEN, (attention,), tied=True, context=CONTEXT)
    return {name: replace(base, layers=layers) for name, layers in stacks.items()}


def compute_flops(blueprint: Any) -> float:
    """Operations of a forward pass for one token in the middle of a text."""
    from potstill.evaluate.size import forward_flops

    return float(forward_flops(blueprint, (CONTEXT + 1) / 2).total)


def train(
    name: str, blueprint: Any, tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Bits per byte of a model trained with `seed`; it is trained if its folder is missing."""
    from potstill.core.card import read_card
    from potstill.models.backbone import Backbone, init_weights
    from potstill.models.families.registry import export_model

    out = options.out / f"{name}-seed{seed}"
    if not is_finished(out):
        print(f"{name}, seed {seed}: {tokens:,} tokens", file=sys.stderr)
        backbone = Backbone(blueprint)
        init_weights(backbone, rng=torch.Generator().manual_seed(seed))
        start = options.out / f"{name}-seed{seed}-start"
        export_model(backbone).save_pretrained(start)
        tokenizer.save_pretrained(start)
        train_on_text(
            out,
            teacher=start,
            student=start,
            data=options.data,
            tokens=tokens,
            context=CONTEXT,
            batch_tokens=options.batch_tokens,
            micro_tokens=options.batch_tokens,
            lr=RATES.get(name, RATE),
            seed=seed,
            documents=200,
            dtype=options.dtype,
        )
    card = read_card(out)
    (bits,) = (m["value"] for m in card["measures"][out.name] if m["name"] == "bits_per_byte")
    parameters = sum(weight.numel() for weight in Backbone(blueprint).parameters())
    return {"bits_per_byte": bits, "parameters": parameters, "seconds": card["cost"]["seconds"]}


def load_tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerFast:
    """The tokenizer of `--out`, trained on the training split if it is missing."""
    from potstill.data.mixture import load_mixture

    folder = options.out / "tokenizer"
    if not folder.exists():
        corpus = load_mixture(options.data, split="train")
        texts = (str(row["text"]) for row in corpus.documents)
        train_byte_tokenizer(texts, options.vocabulary).save_pretrained(folder)
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return loaded


def check_order(figures: dict[str, Any]) -> dict[str, bool]:
    """The published order, each with the same sign at every seed (arXiv:2406.06484 and 2412.06464, tables 2 and 3)."""

    def is_better(a: str, b: str) -> bool:
        pairs = zip(figures[a]["bits_per_byte"], figures[b]["bits_per_byte"], strict=True)
        return all(x < y for x, y in pairs)

    return {
        "DeltaNet below the transformer": is_better("deltanet", "transformer"),
        "Gated DeltaNet below DeltaNet": is_better("gated-deltanet", "deltanet"),
        "the hybrid below Gated DeltaNet": is_better("hybrid", "gated-deltanet"),
        "the transformer below MatMul-free": is_better("transformer", "matmul-free"),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from potstill.core.counts import parse_count

    parser = command_line(__doc__)
    parser.add_argument("--data", required=True, help="a file or folder of text")
    parser.add_argument("--out", type=Path, default=Path("out/from-scratch"), help="folder of the trained models")
    parser.add_argument("--tokens", type=parse_count, default=1_000_000, help="tokens of the transformer")
    parser.add_argument("--batch-tokens", type=parse_count, default=2048, help="tokens of an optimizer step")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dtype", default="auto", help="data type of the products")
    return parser.parse_args()


if __name__ == "__main__":
    main()
