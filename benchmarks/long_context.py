"""A small model trained at 256 tokens, lengthened to 2,048 by every method of `longer`, and trained a little more.

A transformer of a million parameters over a BPE of 1,024 tokens reads books in documents of about 200 tokens. Then it
is converted 8 times as long by each method. It continues on documents of about 2,000 tokens, with a fifth of the tokens
from short ones. `unchanged` continues with the old frequencies. Every document has a planted sentence, "The password of
NAME is VALUE.", several times, so that a model of this size learns to look it up.

Measured on a book that is held out, before and after the continuation: bits per byte by position, and the needle probe.

    python benchmarks/long_context.py --json --books BOOK.txt... --held-out BOOK.txt --out runs

A run that was stopped goes on where it was. `--out` keeps the models and the figures of each.
"""

import argparse
import gzip
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from setting.document import command_line, document, refuse_on_red
from setting.runs import train_on_text
from setting.tokenizer import train_byte_tokenizer

RESTS_ON = ["tests/transforms/test_to_longer.py", "tests/evaluate/test_long_context.py", "tests/ops/test_attention.py"]
CONTEXT, FACTOR = 256, 8
SHORT, LONG = 560, 5400  # characters of a document, before sentences are planted
METHODS = {
    "unchanged": "method=base,theta=10000.1",
    "linear": "method=linear",
    "ntk": "method=ntk",
    "base": "method=base",
    "llama3": "method=llama3",
    "yarn": "method=yarn",
}
GUTENBERG = re.compile(r"\*\*\* ?START OF[^\n]*\*\*\*(.*)\*\*\* ?END OF", re.DOTALL)


def main() -> None:
    """Does what `--out` lacks, and prints one document."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    options.out.mkdir(parents=True, exist_ok=True)
    write_texts(options)
    original = train_original(options)
    figures: dict[str, Any] = {"original": measure(original, options)}
    for name, method in METHODS.items():
        longer, trained = options.out / f"{name}-longer", options.out / f"{name}-trained"
        lengthen(original, longer, method)
        figures[name] = {"before": measure(longer, options)}
        continue_training(longer, original, trained, options)
        figures[name]["after"] = measure(trained, options)
    print(document("long context", figures, check_goals(figures)))


def read_book(path: Path) -> str:
    """The text of a .txt or .txt.gz book without the header and the license of Project Gutenberg."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    found = GUTENBERG.search(text)
    return (found[1] if found else text).strip()


def write_texts(options: argparse.Namespace) -> None:
    """Writes short and long documents with a planted sentence, each with a few held out."""
    books = [read_book(path) for path in options.books]
    for name, size, times in (("short", SHORT, 3), ("long", LONG, 6)):
        folder = options.out / name
        if folder.exists():
            continue
        rng = random.Random(f"{name} documents")
        rows = [json.dumps({"text": plant(text, times, rng)}) + "\n" for book in books for text in cut(book, size)]
        rng.shuffle(rows)
        folder.mkdir()
        (folder / "validation.jsonl").write_text("".join(rows[:50]), encoding="utf-8")
        (folder / "train.jsonl").write_text("".join(rows[50:]), encoding="utf-8")


def cut(text: str, size: int) -> Iterator[str]:
    """Pieces of about `size` characters that end at a space."""
    start = 0
    while start + size < len(text):
        stop = text.find(" ", start + size)
        if stop < 0:
            return
        yield text[start:stop]
        start = stop + 1


def plant(text: str, times: int, rng: random.Random) -> str:
    """The text with one sentence of the needle probe at `times` random places."""
    from potstill.evaluate.long_context import NAMES, NEEDLE, VALUES

    sentence = NEEDLE.format(name=rng.choice(NAMES), value=rng.choice(VALUES))
    spaces = [match.start() for match in re.finditer(" ", text)]
    for place in sorted(rng.sample(spaces, times), reverse=True):
        text = text[:place] + sentence + text[place + 1 :]
    return text


def train_original(options: argparse.Namespace) -> Path:
    """The folder of the model that is trained at 256 tokens."""
    start, out = options.out / "start", options.out / "original"
    if not (start / "config.json").exists():
        tokenizer = train_byte_tokenizer(read_texts(options.out / "short" / "train.jsonl"), 1024)
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=416,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokenizer.save_pretrained(start)
        LlamaForCausalLM(config).save_pretrained(start)
    train_on_text(
        out,
        teacher=start,
        student=start,
        data=options.out / "short",
        tokens=options.tokens,
        context=CONTEXT,
        batch_tokens=2048,
        micro_tokens=2048,
        lr=3e-3,
        documents=20,
        dtype=options.dtype,
    )
    return Path(out)


def read_texts(rows: Path) -> Iterator[str]:
    """The texts of a .jsonl file."""
    return (json.loads(row)["text"] for row in rows.open(encoding="utf-8"))


def lengthen(original: Path, out: Path, method: str) -> None:
    """Converts the model to 8 times its context."""
    import potstill

    if not (out / "card.json").exists():
        potstill.convert(original, to=f"longer:factor={FACTOR},{method}", save_dtype="float32", out=out)


def continue_training(longer: Path, original: Path, out: Path, options: argparse.Namespace) -> None:
    """Trains on long documents and short replay, at the new context."""
    train_on_text(
        out,
        teacher=original,
        student=longer,
        data=(options.out / "long", options.out / "short"),
        min_document_tokens=CONTEXT * FACTOR // 2,
        short_share=0.2,
        tokens=options.more_tokens,
        context=CONTEXT * FACTOR,
        batch_tokens=4096,
        micro_tokens=2048,
        lr=1e-3,
        documents=20,
        dtype=options.dtype,
    )


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte by position and the accuracy of the needle probe by length; kept in the folder."""
    from potstill.evaluate.long_context import NeedleConfig, cut_long_windows, probe_needle, score_by_position
    from potstill.models.load import load_model

    figures = folder / "long-context.json"
    if not figures.exists():
        print(f"measuring {folder}", file=sys.stderr)
        loaded = load_model(folder)
        ids = loaded.tokenizer(read_book(options.held_out)).input_ids
        windows = cut_long_windows([ids], CONTEXT * FACTOR, limit=options.windows)
        positions = score_by_position(loaded.model, loaded.tokenizer, windows)
        needle = NeedleConfig(tokens=CONTEXT * FACTOR, trials=options.trials)
        cells = probe_needle(loaded.model, loaded.tokenizer, ids, needle)
        table = {"positions": positions.to_rows(), "needle": [cell.to_dict() for cell in cells]}
        figures.write_text(json.dumps(table, indent=2))
    result: dict[str, Any] = json.loads(figures.read_text())
    return result


def check_goals(figures: dict[str, Any]) -> dict[str, bool]:
    """What a longer context has to show."""
    near = min(row["bits_per_byte"] for row in figures["original"]["positions"] if row["stop"] <= CONTEXT)
    converted = [name for name in METHODS if name != "unchanged"]

    def far(name: str, time: str) -> float:
        return float(figures[name][time]["positions"][-1]["bits_per_byte"])

    def found(name: str, time: str) -> float:
        cells = [cell for cell in figures[name][time]["needle"] if cell["length"] == CONTEXT * FACTOR]
        return sum(cell["accuracy"] for cell in cells) / len(cells)

    return {
        "before training, every method is below unchanged in the last range": all(
            far(name, "before") < far("unchanged", "before") for name in converted
        ),
        "after it, the last range is below the original's best within its context": all(
            far(name, "after") < near for name in converted
        ),
        "after it, every method finds three times as many needles as a guess at 8 times the length": all(
            found(name, "after") > 3 / 8 for name in converted
        ),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from potstill.core.counts import parse_count

    parser = command_line(__doc__)
    parser.add_argument("--books", type=Path, nargs="+", required=True, help="books to train on, .txt or .txt.gz")
    parser.add_argument("--held-out", type=Path, required=True, help="the book to measure on; it is not trained on")
    parser.add_argument("--out", type=Path, default=Path("out/long-context"), help="folder of models and figures")
    parser.add_argument("--tokens", type=parse_count, default=2_000_000, help="tokens at 256 tokens of context")
    parser.add_argument("--more-tokens", type=parse_count, default=120_000, help="tokens of each continuation")
    parser.add_argument("--windows", type=int, default=16, help="windows of 2,048 tokens to measure on")
    parser.add_argument("--trials", type=int, default=8, help="needles for each length and depth")
    parser.add_argument("--dtype", default="auto", help="data type of the products")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
