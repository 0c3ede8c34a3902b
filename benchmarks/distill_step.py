"""One distillation step beside TRL's GKDTrainer: real tokens per second, peak memory, share of the GEMM roofline.

The floor is a third side: every matrix product of the step, of teacher and student, forward and backward, in its shape
and in bf16, and nothing else. Same teacher (bf16), same student (12 evenly kept layers, fp32 weights, bf16 compute),
same documents in every step and same optimiser, forward KL alone. Each side lives in a process of its own, so that its
peak memory is its own; the parent asks them for one step in turn. TRL runs without gradient checkpointing: faster and
larger than its default. potstill and the floor hold on to memory that they free, as a run of potstill does; TRL runs as
it is. FLOPs counted: 2 per weight of every matrix and token, once for the teacher, three times for the student; no
attention.

    python benchmarks/distill_step.py --json           (needs: pip install 'potstill[bench]')
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

RESTS_ON = ["tests/ops/test_fused.py", "tests/ops/test_attention.py"]
LAYERS, CONTEXT = 12, 512
HEAD = (49152, 576)
SIDES = ("potstill", "floor", "trl")
Step = Callable[[list[list[int]]], float]


def main() -> None:
    """The parent: refuses on a red test, lets both sides step in turn, prints one document."""
    options = arguments()
    if options.side:
        serve(options.side, options.seed)
        return
    if not options.unchecked:
        refuse_on_red()
    sides = {side: Side(side, options.seed) for side in SIDES}
    batches = documents(options.steps + options.warm_up, options.batch_tokens)
    replies: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number, batch in enumerate(batches):
        for side, process in sides.items():
            replies[side].append(process.step(batch))
            print(f"step {number} {side}: {replies[side][-1]}", file=sys.stderr)
    for process in sides.values():
        process.close()
    print(json.dumps(report(replies, batches, options), indent=2))


def report(replies: dict[str, list[dict[str, float]]], batches: list[list[list[int]]], options: Any) -> dict[str, Any]:
    """The figures, with ratios from the same run."""
    peak, sizes = roofline(), matrices()
    flops = 2 * (sizes["teacher"] + 3 * sizes["student"])
    figures: dict[str, Any] = {"gemm_gflops": peak / 1e9, "flops_per_token": flops}
    for side, found in replies.items():
        timed = list(zip(found, batches, strict=True))[options.warm_up :]
        rates = [sum(map(len, batch)) / reply["seconds"] for reply, batch in timed]
        rate = statistics.median(rates)
        figures[side] = {
            "tokens_per_second": rate,
            "range": [min(rates), max(rates)],
            "peak_gib": found[-1]["peak"] / 2**30,
            "roofline": rate * flops / peak,
            "losses": [reply["loss"] for reply in found],
            "milliseconds_per_token": 1e3 / rate,
        }
    ours, theirs = figures["potstill"], figures["trl"]
    figures["times_faster"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
    figures["share_of_memory"] = ours["peak_gib"] / theirs["peak_gib"]
    figures["loss_gap"] = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    figures["times_the_floor"] = statistics.median(
        step["seconds"] / alone["seconds"]
        for step, alone in list(zip(replies["potstill"], replies["floor"], strict=True))[options.warm_up :]
    )
    goals = {
        "losses agree within bf16 noise": "loss_gap <= 0.02",
        "five times TRL's tokens/s": "times_faster >= 5",
        "a third of TRL's memory": "share_of_memory <= 1/3",
        "at most 1.43 times its own products": "times_the_floor <= 1.43",
    }
    met = {
        "losses agree within bf16 noise": figures["loss_gap"] <= 0.02,
        "five times TRL's tokens/s": figures["times_faster"] >= 5,
        "a third of TRL's memory": figures["share_of_memory"] <= 1 / 3,
        "at most 1.43 times its own products": figures["times_the_floor"] <= 1.43,
    }
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    return {"name": "distill_step", "machine": machine, "figures": figures, "goals": goals, "met": met}


class Side:
    """One of the two, in a process of its own."""

    def __init__(self, side: str, seed: int) -> None:
        command = [sys.executable, __file__, "--side", side, "--seed", str(seed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """One optimiser step on `batch`; seconds, loss and peak memory so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(batch) + "\n")
        self.process.stdin.flush()
        reply: dict[str, float] = json.loads(self.process.stdout.readline())
        return reply

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(side: str, seed: int) -> None:
    """The child: a step for every batch that comes in."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print; the parent reads one line a step
    torch.manual_seed(seed)
    from potstill.core import backend

    held = backend.held_memory() if side != "trl" else contextlib.nullcontext()
    held.__enter__()  # until the process ends
    teacher, student = pair()
    if side == "floor":
        step = floor_step(teacher, student)
    else:
        step = {"potstill": potstill_step, "trl": trl_step}[side](teacher, student, adam(student))
    for line in sys.stdin:
        batch = json.loads(line)
        start = time.perf_counter()
        loss = step(batch)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        out.write(json.dumps({"seconds": seconds, "loss": loss, "peak": peak}) + "\n")
        out.flush()


def potstill_step(teacher: Any, student: Any, optimiser: torch.optim.Optimizer) -> Step:
    """Padding-free packs, fused loss."""
    from potstill.data.pack import collate
    from potstill.objectives.distill import Distill
    from potstill.train.study import Study

    study = Study(student, Distill(), frozen={"teacher": teacher}, compute_dtype=torch.bfloat16)

    def step(batch: list[list[int]]) -> float:
        student.train()
        ids = torch.tensor([i for document in batch for i in document])
        labels = torch.tensor([i for document in batch for i in [-100, *document[1:]]])
        lengths = torch.tensor([len(document) for document in batch])
        loss = study(**collate([{"input_ids": ids, "labels": labels, "lengths": lengths}]))["loss"]
        loss.backward()
        return finish(student, optimiser, loss)

    return step


def floor_step(teacher: Any, student: Any, chunk: int = 1024) -> Step:
    """Every matrix product of a step, alone; the head in chunks of rows, as the fused loss takes it."""
    kinds = {
        name: [w.detach().bfloat16() for n, w in model.named_parameters() if w.ndim == 2 and "embed" not in n]
        for name, model in (("teacher", teacher), ("student", student))
    }
    head = torch.randn(HEAD, dtype=torch.bfloat16)

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.T

    def both(x: torch.Tensor, weight: torch.Tensor) -> None:
        y = forward(x, weight)
        y @ weight
        y.T @ x

    def step(batch: list[list[int]]) -> float:
        tokens, rows = sum(map(len, batch)), sum(len(document) - 1 for document in batch)
        inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=torch.bfloat16) for w in kinds["teacher"]}
        for weight in kinds["teacher"]:
            forward(inputs[weight.shape[1]], weight)
        for weight in kinds["student"]:
            both(inputs[weight.shape[1]], weight)
        for some in inputs[HEAD[1]][:rows].split(chunk):
            forward(some, head)
            both(some, head)
        return 0.0

    return step


def trl_step(teacher: Any, student: Any, optimiser: torch.optim.Optimizer) -> Step:
    """GKDTrainer's own training step on the padded batch, forward KL (beta 0), off-policy (lmbda 0)."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from potstill.models import gguf, load

    tokenizer = gguf.load_tokenizer(load.packaged())
    config = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
    )
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model)

    def step(batch: list[list[int]]) -> float:
        width = max(map(len, batch))
        padded = [[*d, *[tokenizer.pad_token_id] * (width - len(d))] for d in batch]
        mask = [[1] * len(d) + [0] * (width - len(d)) for d in batch]
        labels = [[*d, *[-100] * (width - len(d))] for d in batch]
        inputs = {"input_ids": padded, "attention_mask": mask, "labels": labels}
        loss = trainer.training_step(model, {k: torch.tensor(v) for k, v in inputs.items()}, None)
        return finish(student, optimiser, loss)

    return step


def finish(student: torch.nn.Module, optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """Clip, step, zero: the same for both."""
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    return loss.item()


def adam(student: Any) -> torch.optim.Optimizer:
    """The optimiser of both sides."""
    return torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)


def pair() -> tuple[Any, Any]:
    """SmolLM2-135M in bf16 and its student of `LAYERS` layers in fp32."""
    from potstill.models import gguf, load
    from potstill.models.families.table import export_model, import_model
    from potstill.transforms.apply import apply
    from potstill.transforms.drop_layers import DropLayers, evenly

    teacher = gguf.load_model(load.packaged(), dtype=torch.float32)
    whole = import_model(teacher)
    student = export_model(apply(DropLayers(evenly(len(whole.layers), LAYERS)), whole), teacher)
    return teacher.to(torch.bfloat16).eval(), student


def matrices() -> dict[str, int]:
    """Weights of all matrices that a token is multiplied with, head included."""
    from potstill.models import gguf, load
    from potstill.models.families.table import import_model

    whole = import_model(gguf.load_model(load.packaged(), dtype=torch.bfloat16))
    sizes = {name: w.numel() for name, w in whole.state_dict().items() if w.ndim == 2}
    layer = sum(n for name, n in sizes.items() if name.startswith("layers.0."))
    head = sizes["embed.weight"]
    return {"teacher": layer * len(whole.layers) + head, "student": layer * LAYERS + head}


def documents(steps: int, tokens: int) -> list[list[list[int]]]:
    """For each step ragged documents of about `tokens` tokens, from the docstrings of Python's library."""
    from potstill.data.chat import tokenise
    from potstill.data.corpus import load_corpus
    from potstill.models import gguf, load

    rows = tokenise(load_corpus("stdlib"), gguf.load_tokenizer(load.packaged()), limit=steps * tokens * 2)
    found: list[list[list[int]]] = [[]]
    for row in rows:
        if sum(map(len, found[-1])) + len(row.input_ids) > tokens:
            if len(found) == steps:
                break
            found.append([])
        found[-1].append(row.input_ids[:CONTEXT])
    return found


def roofline(size: int = 4096) -> float:
    """FLOP/s of a large square product in bf16, here and now."""
    a = torch.randn(size, size, dtype=torch.bfloat16)
    a @ a
    times = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def refuse_on_red() -> None:
    """A benchmark of wrong code is worth nothing."""
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *RESTS_ON], stdout=sys.stderr)
    if tests.returncode:
        sys.exit("refused: a test that this benchmark rests on is red")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout (always so)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unchecked", action="store_true", help="skip the tests; for development alone")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
