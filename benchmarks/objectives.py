"""What objectives cost a step: with the student's tokenizer beside plain KD, with another beside their own products.

Alike: SmolLM2-135M in bf16 teaches its 12 evenly kept layers (fp32 weights, bf16 compute). Across: a teacher with
another tokenizer, that of `--teacher` (a folder or a GGUF file), or a random Llama of 20 layers of width 768 that
speaks a tokenizer of 16,000 tokens trained here on the docstrings: time does not ask for good weights. Every objective
is 0.7 cross-entropy + 0.3 of itself, as `distill` has it, on packs of docstrings, and trains what it projects with. A
step is reading the batch (across, the teacher's tokens too), both models, loss, backward and AdamW. Each objective
lives in a process of its own, whose peak memory is its own, and takes its steps in turn with plain KD (forward KL) and
with the products: those of both bodies, heads, projections, and of the attention between the two tokenisations, by
shape. Attention inside the models is left out, and hidden and relations have no list.

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

from setting.document import command_line, document, parsed, passed_on, refuse_on_red
from setting.memory import peak
from setting.networks import both, random_teacher, sizes, translating
from setting.products import Linear, of_a_step, seconds
from setting.sides import Side, serve
from setting.steps import adam, packed, study_step
from setting.text import documents

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
    """The parent: refuses on a red test, has every objective take steps, prints one document."""
    options = arguments()
    if options.side == PRODUCTS:
        serve(lambda: alone)
        return
    if options.side:
        serve(lambda: stepping(options), held=True)
        return
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    batches = documents(options.steps + options.warm_up, options.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        options.teacher = options.teacher or random_teacher(Path(folder), quick=options.quick)
        print(report(compared(batches, options), options))


def compared(batches: list[list[list[int]]], options: argparse.Namespace) -> dict[str, list[dict[str, Reply]]]:
    """For each objective every round: what it, plain KD and its products answered."""
    flags = ["--seed", str(options.seed), "--teacher", options.teacher]
    flags += passed_on(options, "quick", "cpu_seconds")
    plain, products = (Side(["--side", name, *flags]) for name in (PLAIN, PRODUCTS))
    found: dict[str, list[dict[str, Reply]]] = {}
    for name in options.only or (*ALIKE, *ACROSS):
        side = Side(["--side", name, *flags])
        found[name] = []
        for batch in batches:
            answers = {"plain": plain.ask(batch), "own": side.ask(batch)}
            answers["products"] = products.ask([answers["own"]["products"], answers["plain"]["products"]])
            found[name].append(answers)
            print(f"{name}: {summary(answers)}", file=sys.stderr)
        side.close()
    plain.close()
    products.close()
    return found


def summary(answers: dict[str, Reply]) -> str:
    """One round in a line."""
    own, plain, alone = answers["own"], answers["plain"], answers["products"]
    return f"{own['seconds']:.2f} s, its products {alone['own']:.2f} s, plain {plain['seconds']:.2f} s"


def report(found: dict[str, list[dict[str, Reply]]], options: argparse.Namespace) -> str:
    """The figures, with ratios within each round."""
    figures = {name: figure(rounds[options.warm_up :]) for name, rounds in found.items()}
    met = {}
    for name, one in figures.items():
        if name in ("dskd", "dskdv2"):
            met[f"{name} at most {AT_MOST_PLAIN} times plain KD"] = one["times_plain"]["median"] <= AT_MOST_PLAIN
        if name in ACROSS:
            most = AT_MOST_PRODUCTS
            met[f"{name} at most {most} times its own products"] = one["times_its_products"]["median"] <= most
    return document("objectives", {"teacher across": options.teacher, "objectives": figures}, met)


def figure(rounds: list[dict[str, Reply]]) -> dict[str, Any]:
    """One objective: seconds, what they are beside its products and (one tokenizer) beside plain KD, memory."""
    own, plain, alone = ([one[name] for one in rounds] for name in ("own", "plain", "products"))
    pairs = list(zip(own, plain, alone, strict=True))
    found: dict[str, Any] = {
        "seconds": spread([o["seconds"] for o in own]),
        "of them reading": spread([o["reading"] for o in own]),
        "peak_gib": own[-1]["peak"] / 2**30,
        "loss": [o["loss"] for o in own],
    }
    if own[0]["products"]:
        found["its_products_gflop"] = sum(Linear(*one).flops for one in own[-1]["products"]) / 1e9
        found["times_its_products"] = spread([o["seconds"] / a["own"] for o, _, a in pairs])
    if not own[0]["across"]:
        found["times_plain"] = spread([o["seconds"] / p["seconds"] for o, p, _ in pairs])
        found["times_plains_memory"] = own[-1]["peak"] / plain[-1]["peak"]
        found["plain_times_its_products"] = spread([p["seconds"] / a["plain"] for _, p, a in pairs])
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """The median and both ends."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def alone(lists: list[list[list[Any]]]) -> dict[str, float]:
    """The child that multiplies and does nothing else: seconds of two lists of products."""
    own, plain = ([Linear(*one) for one in some] for some in lists)
    return {"own": seconds(own) if own else 0.0, "plain": seconds(plain)}


def stepping(options: argparse.Namespace) -> Callable[[list[list[int]]], Reply]:
    """The child of one objective: a step for every batch that comes in."""
    from potstill.objectives.config import ObjectiveConfig
    from potstill.train.training_module import TrainingModule

    torch.manual_seed(options.seed)
    across = options.side in ACROSS
    sides = both(options.teacher if across else None, quick=options.quick)
    mixture = ObjectiveConfig(name=options.side)
    objective: Any = mixture.build(sides)
    vocabulary = dict(zip(("student", "teacher"), sides.vocabularies, strict=True))
    frozen = {"teacher": sides.teacher.model}
    study = TrainingModule(
        sides.student.model, objective, frozen=frozen, vocabulary=vocabulary, compute_dtype=torch.bfloat16
    )
    beside = translating(sides, warped=mixture.needs_edit_alignment) if across else dict
    made: dict[str, Any] = {}

    def read(batch: list[list[int]]) -> Any:
        start = time.perf_counter()
        made["batch"] = packed(batch, beside)
        made["reading"] = time.perf_counter() - start
        return made["batch"]

    step = study_step(study, adam(study), read)

    def once(batch: list[list[int]]) -> Reply:
        start = time.perf_counter()
        loss = step(batch)
        reply = {"seconds": time.perf_counter() - start, "loss": loss, "peak": peak(), "across": across}
        products = of_a_step(*sizes(sides, made["batch"], across=across), objective.parts[1][1], made["batch"])
        return {**reply, "reading": made["reading"], "products": products}

    return once


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="the student's tokens in a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--teacher", help="one with another tokenizer: a folder or a GGUF file")
    parser.add_argument("--only", nargs="+", choices=(*ALIKE, *ACROSS), help="some objectives, for development alone")
    parser.add_argument("--quick", action="store_true", help="tiny random models; the figures mean nothing")
    parser.add_argument("--side", choices=(PLAIN, PRODUCTS, *ALIKE, *ACROSS), help=argparse.SUPPRESS)
    return parsed(parser)


if __name__ == "__main__":
    main()
