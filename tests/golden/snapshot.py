"""Take a snapshot of everything that potstill writes and prints on fixed seeds, to compare two versions of it.

    python -m tests.golden.snapshot /tmp/before.json        # on the version that is right
    python -m tests.golden.snapshot /tmp/after.json --against /tmp/before.json

The snapshot goes through the command line alone, so that it survives any move inside the package: every recipe's tiny
form (also between two tokenizers), `--dry-run --json` of every verb, a cache, runs that read it, several teachers,
LoRA, an arena, a doctor, measures, and the files of a checkpoint. Weights enter as SHA-256 of their bytes. Times,
versions and paths are left out. Compare on one machine: the last bit of a product depends on the processor.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import torch
from safetensors.torch import load_file
from tests.stages.world import interrupted
from tests.tiny import byte_tokenizer, random_llama
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Snapshot = dict[str, Any]

VOLATILE = {  # keys whose values are of the machine, the moment or the version
    *("seconds", "command", "created", "versions", "machine", "tokens_per_second", "peak_memory", "memory", "time"),
    *("bytes_free", "free", "cpu", "threads", "python", "torch", "transformers", "potstill", "path", "elapsed"),
    *("peak_bytes", "train_seconds", "peak_rss", "rss", "version"),
}
WORDS = ["the", "still", "boils", "a", "wash", "and", "its", "spirit", "runs", "over", "into", "cold", "worms", "while"]
UNTRAINED = ("self-speculative", "spec-game")  # recipes without a budget of tokens
ALIGNED = ("aligndistil",)  # recipes that read preferences
GUESSED = ("cm-align", "m-thinker")  # recipes whose model has to be right at times, which a random one is not
WEIGHTS = (".safetensors", ".bin", ".npy", ".npz", ".rows", ".ends", ".keys", ".hidden")


def main() -> None:
    """Write the snapshot to a file; with `--against`, list what differs and exit with 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", default="", help="take the entries alone whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = {}
        for name, entry in entries(Path(folder)):
            if options.only in name:
                print(name, file=sys.stderr, flush=True)
                snapshot[name] = entry()
    options.file.write_text(json.dumps(snapshot, indent=1, sort_keys=True, ensure_ascii=False))
    if options.against:
        before = {k: v for k, v in json.loads(options.against.read_text()).items() if options.only in k}
        lines = list(differences(before, json.loads(options.file.read_text())))
        print("\n".join(lines) or "no difference")
        sys.exit(bool(lines))


def entries(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every entry by name, with the function that takes it; later ones read what earlier ones wrote."""
    world = make_world(folder)
    teacher, student, stranger, text, pairs = (
        str(world[k]) for k in ("teacher", "student", "stranger", "text", "pairs")
    )
    roomy, preferences = str(world["roomy"]), str(world["preferences"])

    def run(*arguments: str) -> Callable[[], Any]:
        return lambda: scrub(call(*arguments, "--json"), folder)

    def make(name: str, *arguments: str) -> Callable[[], Any]:
        def entry() -> Any:
            out = folder / "out" / name
            printed = call(*arguments, "--out", str(out), "--json")
            return {"printed": scrub(printed, folder), "files": describe(out, folder)}

        return entry

    recipes = [recipe["name"] for recipe in call("recipes", "--json")]
    yield "recipes", run("recipes")
    for name in (name for name in recipes if name not in GUESSED):
        budget = () if name in UNTRAINED else ("--tokens", "256")
        data = preferences if name in ALIGNED else pairs
        yield (
            f"recipe {name}",
            make(f"recipe-{name}", "run", name, "--tiny", "--teacher", roomy, "--data", data, *budget),
        )
    for name in ("dskd-cma", "dskdv2-eta", "mined", "uld"):
        small = ("--teacher", stranger, "--student", teacher, "--data", pairs, "--tokens", "256")
        yield f"recipe {name} across", make(f"across-{name}", "run", name, "--tiny", *small)
    base = ("--teacher", teacher, "--data", text, "--context", "64", "--batch-tokens", "256", "--documents", "4")
    train = (*base, "--tokens", "1024")
    for verb, more in {
        "distill": (*train, "--keep", "0.75"),
        "prune": (teacher, "--keep", "0.75", "--data", text),
        "arena": (*base, "--keep", "0.75", "--budget", "1k", "--prompts", "0"),
        "cache": ("--teacher", teacher, "--data", text, "--context", "64"),
        "run": ("minima", "--teacher", teacher, "--data", text),
    }.items():
        at = folder / "out" / f"dry-{verb}"
        positional = more[:1] if verb in ("prune", "run") else ()
        yield f"dry-run {verb}", run(verb, *positional, *more[len(positional) :], "--out", str(at), "--dry-run")
    yield "data", run("data", text)
    yield "prune", make("prune", "prune", roomy, "--keep", "0.6", "--data", text)
    for objective in ("cross_entropy", "forward_kl", "jsd:beta=0.3", "adaptive_kl", "hidden:map=1-1/2-3", "relations"):
        yield (
            f"distill {objective}",
            make(
                f"distill-{objective.partition(':')[0]}",
                "distill",
                *train,
                "--student",
                student,
                "--objective",
                objective,
            ),
        )
    yield (
        "distill evaluated",
        make("distill-evaluated", "distill", *train, "--student", student, "--eval-every", "2", "--micro-tokens", "64"),
    )
    yield "distill lora", make("distill-lora", "distill", *train, "--student", student, "--lora", "2")
    yield (
        "distill on-policy",
        make(
            "distill-on-policy",
            *(
                "distill",
                "--teacher",
                teacher,
                "--student",
                student,
                "--data",
                pairs,
                "--context",
                "64",
                "--batch-tokens",
                "256",
            ),
            *("--documents", "4", "--tokens", "512", "--on-policy", "0.5", "--objective", "reverse_kl"),
        ),
    )
    cache = folder / "out" / "cache"
    yield (
        "cache",
        make("cache", "cache", "--teacher", teacher, "--data", text, "--context", "64", "--top-k", "8", "--seed", "1"),
    )
    hidden = folder / "out" / "cache-hidden"
    yield (
        "cache hidden",
        make(
            "cache-hidden", "cache", "--teacher", teacher, "--data", text, "--context", "64", "--top-k", "8", "--hidden"
        ),
    )
    yield "cache ls", run("cache", "ls", str(folder / "out"))
    yield (
        "distill cached",
        make("distill-cached", "distill", *train, "--student", student, "--teacher-cache", str(cache)),
    )
    yield (
        "distill cached hidden",
        make(
            "distill-cached-hidden",
            *("distill", *train, "--student", student, "--teacher-cache", str(hidden), "--objective", "dskd"),
        ),
    )
    several = ("--teacher", f"first={teacher}", "--teacher", f"second={roomy}", *train[2:], "--student", student)
    yield "distill several", make("distill-several", "distill", *several, "--combine", "confidence")
    yield "doctor", run("doctor", "--teacher", teacher, "--student", student, "--data", text, "--context", "64")
    yield (
        "doctor across",
        run(
            *(
                "doctor",
                "--teacher",
                stranger,
                "--student",
                teacher,
                "--data",
                pairs,
                "--context",
                "64",
                "--objective",
                "uld",
            )
        ),
    )
    yield "measure", run("measure", student, "--teacher", teacher, "--data", text, "--documents", "4")
    yield "generate", run("generate", teacher, "--prompt", "the still", "--max-tokens", "8")
    yield (
        "generate data",
        make("answers", "generate", roomy, "--data", pairs, "--documents", "16", "--max-tokens", "200"),
    )
    yield (
        "arena",
        make("arena", "arena", *base, "--student", student, "--budget", "512", "--seeds", "2", "--prompts", "0"),
    )
    yield (
        "plan keys",
        lambda: keys(
            call("plan", *train[:-4], *train[-2:], "--student", student, "--no-measure", "--json", "--out", str(folder))
        ),
    )


def make_preference(row: dict[str, str]) -> dict[str, str]:
    """A question with its answer, which is chosen, and another one."""
    return {"prompt": row["prompt"], "chosen": row["response"], "rejected": "I do not know."}


def make_world(folder: Path) -> dict[str, Path]:
    """Two tokenizers, four tiny models and two data sets in `folder`."""
    from tests.data.trained import byte_level

    bytes_ = byte_tokenizer()
    deep = {"num_hidden_layers": 16, "intermediate_size": 128, "max_position_embeddings": 512}
    config = LlamaConfig(**{**random_llama(bytes_).config.to_dict(), **deep})
    thin = LlamaConfig(**{**random_llama(bytes_, context=512).config.to_dict(), "num_hidden_layers": 2})
    lines = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 12)) + f" {i}."} for i in range(80)]
    questions = [{"prompt": f"What is {i} + 1?", "response": f"It is {i + 1}."} for i in range(60)]
    return {
        "teacher": save(folder / "teacher", random_llama(bytes_, context=512), bytes_),
        "student": save(folder / "student", seeded(thin), bytes_),
        "roomy": save(folder / "roomy", seeded(config), bytes_),
        "stranger": save(folder / "stranger", random_llama(byte_level(), context=512), byte_level()),
        "text": write(folder / "text.jsonl", lines),
        "pairs": write(folder / "pairs.jsonl", questions),
        "preferences": write(folder / "preferences.jsonl", [make_preference(row) for row in questions]),
    }


def seeded(config: LlamaConfig) -> LlamaForCausalLM:
    """A random Llama of seed 1."""
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder under the Apache license."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """`rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*arguments: str) -> Any:
    """What `potstill ARGUMENTS` prints, as JSON where it is JSON, or its error."""
    from potstill.cli.app import main as potstill

    printed, before = io.StringIO(), sys.argv
    sys.argv = ["potstill", *arguments]
    code: Any = 0
    try:
        with redirect_stdout(printed):
            potstill()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    text = printed.getvalue()
    try:
        found = json.loads(text)
    except ValueError:
        return {"exit": code, "text": text}
    return found if code == 0 else {"exit": code, "json": found}


def describe(out: Path, folder: Path) -> Any:
    """The files below `out`: JSON and JSON lines as values, weights as a digest, others by name."""
    files: Snapshot = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(file.relative_to(out))
        if file.suffix in (".json",) and "tokenizer" not in file.name:
            files[name] = scrub(json.loads(file.read_text()), folder)
        elif file.suffix == ".jsonl":
            files[name] = [scrub(json.loads(line), folder) for line in file.read_text().splitlines()]
        elif file.suffix in (".md", ".png"):
            files[name] = "a file"  # its words change on purpose, and its numbers stand in the card
        else:
            files[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return files


def checkpoint(out: Path, *arguments: str) -> Any:
    """The files of the last checkpoint of a run that is interrupted, each with its keys."""
    with interrupted(out):
        call("distill", *arguments, "--save-every", "1", "--batch-tokens", "64", "--out", str(out))
    (folder,) = sorted((out / "training").glob("checkpoint-*"))[-1:]
    files: Snapshot = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        held: Any = None
        if file.suffix == ".json":
            held = keys(json.loads(file.read_text()))
        elif file.suffix == ".safetensors":
            held = sorted(load_file(file))
        elif file.suffix == ".pt":
            held = keys(torch.load(file, weights_only=False))
        files[str(file.relative_to(folder))] = held
    return files


def scrub(value: Any, folder: Path) -> Any:
    """`value` without what belongs to the machine, the moment or the folder."""
    if isinstance(value, dict):
        if value.get("name") in ("prefill", "decode", "decode memory", "peak memory", "latency"):
            return {"name": value["name"]}
        return {k: scrub(v, folder) for k, v in value.items() if k not in VOLATILE and not k.endswith("seconds")}
    if isinstance(value, list):
        return [scrub(item, folder) for item in value]
    return value.replace(str(folder), "<folder>") if isinstance(value, str) else value


def keys(value: Any) -> Any:
    """The keys of nested dictionaries."""
    if isinstance(value, dict):
        return {str(k): keys(v) for k, v in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else type(value).__name__


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """A line for each place where two snapshots differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in before or key not in after:
                yield f"{at}/{key}: only {'after' if key not in before else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{at}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            yield from differences(a, b, f"{at}/{i}")
    elif before != after:
        yield f"{at}: {str(before)[:200]} -> {str(after)[:200]}"


if __name__ == "__main__":
    main()
