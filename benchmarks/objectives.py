"""What objectives cost per step: with one tokenizer compared with plain KD, with two with their own products.

With one tokenizer SmolLM2-135M in bf16 teaches a student of 12 of its layers (fp32 weights, bf16 compute). With two,
the teacher is `--teacher` (a folder or a GGUF file), or a random Llama of 20 layers of width 768 with a tokenizer of
16,000 tokens trained on the docstrings: the time does not depend on good weights. Every objective is 0.7 cross-
entropy + 0.3 of itself, as in `distill`, on packs of docstrings, and trains its own projections. A step reads the
batch (with two tokenizers the teacher's tokens too) and runs both models, loss, backward and AdamW. Each objective
has its own process, so that its peak memory is its own. It takes turns with plain KD (forward KL) and with its
products: those of both bodies, heads, projections, and attention between the two tokenizations, by shape. Attention
inside the models is left out, and hidden and relations have no list of products.

    python benchmarks/objectives.py --json --teacher FOLDER_OR_GGUF
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from setting.document import command_line, document, forward_flags, parse_arguments, refuse_on_red
from setting.memory import peak
from setting.networks import build_pair_info, list_network_sizes, make_random_teacher, make_translator
from setting.products import Linear, of_a_step, seconds
from setting.sides import Side, serve
from setting.steps import make_optimizer, make_step, pack_documents
from setting.text import load_documents

RESTS_ON = [
    "tests/objectives/test_dual_space.py",
    "tests/objectives/test_across.py",
    "tests/objectives/test_tie_kd.py",
    "tests/objectives/test_hidden_states.py",
    "tests/ops/test_cross_attention.py",
]
PLAIN, PRODUCTS = "forward_kl", "products"
ALIKE = ("dskd", "dskdv2", "tie_kd", "hidden", "relations")
ACROSS = ("uld", "mined", "spans", "dskd_cma", "dskdv2_eta")
AT_MOST_PLAIN, AT_MOST_PRODUCTS = 1.8, 1.3
Reply = dict[str, Any]


def main() -> None:
    """The parent: refuses if a test fails, lets every objective take steps, prints one document."""
    options = parse_options()
    if options.side == PRODUCTS:
        serve(lambda: time_two_lists)
        return
    if options.side:
        serve(lambda: make_stepper(options), retain_memory=True)
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    batches = load_documents(options.steps + options.warm_up, options.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        options.teacher = options.teacher or make_random_teacher(Path(folder), quick=options.quick)
        print(report(compare(batches, options), options))


def compare(batches: list[list[list[int]]], options: argparse.Namespace) -> dict[str, list[dict[str, Reply]]]:
    """For each objective and round: the replies of it, of plain KD and of its products."""
    flags = ["--seed", str(options.seed), "--teacher", options.teacher]
    flags += forward_flags(options, "quick", "cpu_seconds")
    plain, products = (Side(["--side", name, *flags]) for name in (PLAIN, PRODUCTS))
    rounds: dict[str, list[dict[str, Reply]]] = {}
    for name in options.only or (*ALIKE, *ACROSS):
        side = Side(["--side", name, *flags])
        rounds[name] = []
        for batch in batches:
            answers = {"plain": plain.ask(batch), "own": side.ask(batch)}
            answers["products"] = products.ask([answers["own"]["products"], answers["plain"]["products"]])
            rounds[name].append(answers)
            print(f"{name}: {summarize(answers)}", file=sys.stderr)
        side.close()
    plain.close()
    products.close()
    return rounds


def summarize(answers: dict[str, Reply]) -> str:
    """One round in a line."""
    reply, plain, products = answers["own"], answers["plain"], answers["products"]
    return f"{reply['seconds']:.2f} s, its products {products['own']:.2f} s, plain {plain['seconds']:.2f} s"


def report(rounds: dict[str, list[dict[str, Reply]]], options: argparse.Namespace) -> str:
    """The figures, with ratios within each round."""
    figures = {name: compute_figures(rounds[options.warm_up :]) for name, rounds in rounds.items()}
    met = {}
    for name, figure in figures.items():
        if name in ("dskd", "dskdv2"):
            met[f"{name} at most {AT_MOST_PLAIN} times plain KD"] = figure["times_plain"]["median"] <= AT_MOST_PLAIN
        if name in ACROSS:
            most = AT_MOST_PRODUCTS
            met[f"{name} at most {most} times its own products"] = figure["times_its_products"]["median"] <= most
    return document("objectives", {"teacher across": options.teacher, "objectives": figures}, met)


def compute_figures(rounds: list[dict[str, Reply]]) -> dict[str, Any]:
    """One objective: seconds, ratios to its products and (one tokenizer) to plain KD, memory."""
    own_replies, plain_replies, products = (
        [round_replies[name] for round_replies in rounds] for name in ("own", "plain", "products")
    )
    pairs = list(zip(own_replies, plain_replies, products, strict=True))
    figures: dict[str, Any] = {
        "seconds": summarize_values([o["seconds"] for o in own_replies]),
        "of them reading": summarize_values([o["reading"] for o in own_replies]),
        "peak_gib": own_replies[-1]["peak"] / 2**30,
        "loss": [o["loss"] for o in own_replies],
    }
    if own_replies[0]["products"]:
        figures["its_products_gflop"] = (
            sum(Linear(*round_replies).flops for round_replies in own_replies[-1]["products"]) / 1e9
        )
        figures["times_its_products"] = summarize_values([o["seconds"] / a["own"] for o, _, a in pairs])
    if not own_replies[0]["across"]:
        figures["times_plain"] = summarize_values([o["seconds"] / p["seconds"] for o, p, _ in pairs])
        figures["times_plains_memory"] = own_replies[-1]["peak"] / plain_replies[-1]["peak"]
        figures["plain_times_its_products"] = summarize_values([p["seconds"] / a["plain"] for _, p, a in pairs])
    return figures


def summarize_values(values: list[float]) -> dict[str, Any]:
    """The median and the range."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def time_two_lists(lists: list[list[list[Any]]]) -> dict[str, float]:
    """The child that only multiplies: seconds of two lists of products."""
    own_products, plain_products = ([Linear(*product) for product in some] for some in lists)
    return {"own": seconds(own_products) if own_products else 0.0, "plain": seconds(plain_products)}


def make_stepper(options: argparse.Namespace) -> Callable[[list[list[int]]], Reply]:
    """The child of one objective: takes a step for every batch that it receives."""
    from potstill.objectives.config import ObjectiveConfig
    from potstill.train.training_module import TrainingModule

    torch.manual_seed(options.seed)
    across = options.side in ACROSS
    pair_info = build_pair_info(options.teacher if across else None, quick=options.quick)
    config = ObjectiveConfig(name=options.side)
    objective: Any = config.build(pair_info)
    vocabulary = dict(zip(("student", "teacher"), pair_info.vocab_sizes, strict=True))
    frozen = {"teacher": pair_info.teacher.model}
    module = TrainingModule(
        pair_info.student.model, objective, frozen=frozen, vocabulary=vocabulary, compute_dtype=torch.bfloat16
    )
    beside = make_translator(pair_info, warped=config.needs_edit_alignment) if across else dict
    latest: dict[str, Any] = {}

    def read(batch: list[list[int]]) -> Any:
        start = time.perf_counter()
        latest["batch"] = pack_documents(batch, beside)
        latest["reading"] = time.perf_counter() - start
        return latest["batch"]

    step = make_step(module, make_optimizer(module), read)

    def answer(batch: list[list[int]]) -> Reply:
        start = time.perf_counter()
        loss = step(batch)
        reply = {"seconds": time.perf_counter() - start, "loss": loss, "peak": peak(), "across": across}
        student, teacher = list_network_sizes(pair_info, latest["batch"], across=across)
        products = of_a_step(student, teacher, objective.parts[1][1], latest["batch"])
        return {**reply, "reading": latest["reading"], "products": products}

    return answer


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="the student's tokens in a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--teacher", help="a teacher with another tokenizer: a folder or a GGUF file")
    parser.add_argument(
        "--only", nargs="+", choices=(*ALIKE, *ACROSS), help="run these objectives only; for development"
    )
    parser.add_argument("--quick", action="store_true", help="tiny random models; the figures mean nothing")
    parser.add_argument("--side", choices=(PLAIN, PRODUCTS, *ALIKE, *ACROSS), help=argparse.SUPPRESS)
    return parse_arguments(parser)


if __name__ == "__main__":
    main()
