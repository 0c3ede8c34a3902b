"""Phoenix's three mixes, and NEFTune off and on: bits per byte of held-out answers, per language.

SmolLM2 is fine-tuned under the template `phoenix` on instructions (Alpaca in English and Chinese), on conversations
(turns of HH-harmless), and on both; and on both with NEFTune. Each run reads `--tokens` tokens. Measured are held-out
answers to instructions in each language, and in conversations. One seed and few tokens allow no claim about larger
runs. Finished runs in `--out` are not repeated. The data are read from $POTSTILL_DATA.

    python benchmarks/chat_mixes.py --json --out runs --tokens 4096
"""

import argparse
import gzip
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from setting.document import command_line, document, refuse_on_red
from setting.runs import is_finished, select_measures

RESTS_ON = ["tests/train/test_embedding_noise.py", "tests/data/test_named_templates.py", "tests/data/test_mixture.py"]
TEMPLATE = "phoenix"
ALPACA = "instruct/hiyouga__LLaMA-Factory/data/alpaca_{}_demo.json.gz"
HARMLESS = "instruct/anthropics__hh-rlhf/harmless-base/test.jsonl.gz"
SETS = ("en", "zh", "turns")
ARMS: dict[str, tuple[tuple[str, ...], float]] = {  # the data sets, and NEFTune's alpha
    "instructions": (("en", "zh"), 0.0),
    "conversations": (("turns",), 0.0),
    "both": (SETS, 0.0),
    "both-neftune": (SETS, 5.0),
}
TURN = re.compile(r"\n\n(Human|Assistant): ")
MAX_CHARACTERS = {"en": 700, "zh": 260, "turns": 700}  # of a row


def main() -> None:
    """Trains what `--out` lacks, measures all models on each data set, and prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    files = write_data(Path(os.environ["POTSTILL_DATA"]), options.out / "data")
    for name, (sets, alpha) in ARMS.items():
        train_arm(options, name, [files[data] for data in sets], alpha)
    models = {"before": options.model, **{name: options.out / name for name in ARMS}}
    figures = {
        data: {name: measure_model(options, model, data, file) for name, model in models.items()}
        for data, file in files.items()
    }
    print(document("chat mixes", figures, check_goals(figures)))


def write_data(source: Path, folder: Path) -> dict[str, Path]:
    """A file of rows for each data set."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {data: read_alpaca(source / ALPACA.format(data)) for data in ("en", "zh")}
    rows["turns"] = list(read_turns(source / HARMLESS))
    files = {}
    for data, all_rows in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in all_rows]
        files[data] = folder / f"{data}.jsonl"
        files[data].write_text("".join(f"{line}\n" for line in lines if len(line) <= MAX_CHARACTERS[data]))
    return files


def read_alpaca(file: Path) -> list[dict[str, str]]:
    """Rows of `instruction`, `input` and `output`."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        rows: list[dict[str, str]] = json.load(stream)
    return [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]


def read_turns(file: Path) -> Iterable[dict[str, Any]]:
    """The chosen chats of several questions, up to their last answer, as messages."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        for line in stream:
            parts = TURN.split(json.loads(line)["chosen"])[1:]
            roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
            turns = list(zip(roles, parts[1::2], strict=True))
            if len(turns) >= 4 and all(content.strip() for _, content in turns):
                yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def train_arm(options: argparse.Namespace, name: str, data: list[Path], alpha: float) -> None:
    """Fine-tunes the model on a mix, unless that is done."""
    import potstill

    out = options.out / name
    if is_finished(out):
        return
    print(f"training {name}", file=sys.stderr)
    potstill.distill(
        teacher=options.model,
        student=options.model,
        objective="cross_entropy",
        data=[str(file) for file in data] if len(data) > 1 else str(data[0]),
        chat_template=TEMPLATE,
        tokens=options.tokens,
        context=256,
        batch_tokens=512,
        lr=options.lr,
        warmup=0.03,
        weight_decay=0.0,
        neftune=alpha,
        save_every=10_000,
        documents=1,
        skip_doctor=True,
        dtype=options.dtype,
        out=out,
        overwrite=out.exists(),
    )


def measure_model(options: argparse.Namespace, model: str | Path, data: str, file: Path) -> list[float]:
    """Bits per byte of the held-out answers of a data set, with the interval over documents."""
    import potstill

    report = options.out / f"measures-{Path(model).name}-{data}.json"
    if not report.exists():
        print(f"measuring {model} on {data}", file=sys.stderr)
        potstill.measure(
            model,
            data=file,
            chat_template=TEMPLATE,
            documents=options.documents,
            prompts=0,
            speed=False,
            dtype=options.dtype,
            out=report,
        )
    (measures,) = json.loads(report.read_text())["models"].values()
    bits: list[float] = select_measures(measures, ("bits_per_byte",))["bits_per_byte"]
    return bits


def check_goals(figures: Mapping[str, Mapping[str, list[float]]]) -> dict[str, bool]:
    """Whether the mix of both is the best of the three on average, and whether NEFTune lowers that average."""
    means = {name: sum(values[name][0] for values in figures.values()) / len(figures) for name in ARMS}
    return {
        "both has the fewest bits per byte on average": means["both"] == min(means[name] for name in list(ARMS)[:3]),
        "NEFTune lowers the average of both": means["both-neftune"] < means["both"],
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from potstill.core.counts import parse_count

    parser = command_line(__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=parse_count, default=4096)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/chat-mixes"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
