"""How much of a text two tokenizers cut alike, and what finding it costs.

For each kind of text: the share of the student's tokens that stand for the same bytes as one of the teacher's (exact),
that begin where one of the teacher's begins (same context), and that are in a group of the merged spans; then the
student's tokens a second of each stage. Without `--teacher`, one of SentencePiece's kind with 8,000 tokens is trained
on the docstrings of the standard library. Chats, Chinese, Japanese and Korean come from `$POTSTILL_DATA` and are left
out without it. Chats are written with SmolLM2's template for both, whose marks the teacher reads as plain text.

    python benchmarks/alignment.py --json --teacher FOLDER_OR_GGUF
"""

import argparse
import gzip
import json
import os
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from potstill.data.cross_tokenizer.token_spans import locate_tokens
from potstill.data.docstrings import list_modules, load_docstrings
from potstill.models import gguf, load
from potstill.models.tokenizers.token_bytes import TokenBytes, match_tokens, read_token_bytes
from potstill.ops import align, edit_distance
from setting.document import command_line, document, refuse_on_red
from setting.tokenizer import trained

RESTS_ON = [
    "tests/ops/test_align.py",
    "tests/ops/test_edit_distance.py",
    "tests/data/cross_tokenizer/test_token_spans.py",
]
CHARACTERS, LONGEST = 400_000, 4_000
GOAL = "locating the tokens of a text takes at most 1 % of a step of 4 ms a token"
EMOJI = "I'm so happy 😀🎉! 👩‍👩‍👧‍👦 went to 🇯🇵 and ate 🍣🍜 🤷🏽‍♀️ ❤️‍🔥 thanks 🙏🏿🙏 see you at 8️⃣ 😂😂😂. "
Side = tuple[PreTrainedTokenizerBase, TokenBytes]


def main() -> None:
    """Refuses on a red test, measures every kind of text, prints one document."""
    options = arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    student, teacher = tokenizer(options.student), tokenizer(options.teacher)
    sides = (student, read_token_bytes(student)), (teacher, read_token_bytes(teacher))
    shared = int((match_tokens(sides[0][1], sides[1][1]) >= 0).sum())
    vocabulary = {"student": len(student), "teacher": len(teacher), "student ids that the teacher has": shared}
    texts = {kind: measured(some, *sides) for kind, some in kinds(student)}
    met = {GOAL: all(one["tokens a CPU second"]["tokenised and located"] >= 25_000 for one in texts.values())}
    print(document("alignment", {"vocabulary": vocabulary, "texts": texts}, met))


def measured(texts: Sequence[str], student: Side, teacher: Side) -> dict[str, Any]:
    """Shares over all `texts`, and rates in the student's tokens a second."""
    read, ours = clocked(lambda: locate_tokens(texts, *student))
    _, theirs = clocked(lambda: locate_tokens(texts, *teacher))
    bare, _ = clocked(lambda: student[0](list(texts), verbose=False))
    first, second = (end_to_end([one.spans for one in side], texts) for side in (ours, theirs))
    seconds, pairs = clocked(lambda: align.match_spans(first, second))
    merging, groups = clocked(lambda: align.merge_spans(first, second))
    real = first[:, 0] < first[:, 1]
    tokens = len(first)
    some = list(zip(ours, theirs, strict=True))[:20]
    warping, warped = clocked(lambda: sum(warp(a.ids, b.ids, student[1], teacher[1]) for a, b in some))
    return {
        "tokens": {"student": tokens, "teacher": len(second), "bytes": sum(len(text.encode()) for text in texts)},
        "exact": align.compute_coverage(pairs[:, 0], real),
        "same context": align.compute_coverage(align.match_starts(first, second)[:, 0], real),
        "in groups": align.compute_coverage(torch.nonzero(groups.first >= 0)[:, 0], real),
        "student tokens a group": float(real.sum()) / max(1, groups.total),
        "tokens a CPU second": {
            "tokenised": tokens / bare,
            "tokenised and located": tokens / read,
            "exact": tokens / seconds,
            "merged": tokens / merging,
            "warped (MinED)": warped / warping,
        },
    }


def warp(ours: torch.Tensor, theirs: torch.Tensor, student: TokenBytes, teacher: TokenBytes) -> int:
    """The tokens of one text, paired by minimum edit distance."""
    first, second = (
        [known.by_id[i].strip() for i in ids.tolist()] for known, ids in ((teacher, theirs), (student, ours))
    )
    edit_distance.find_single_matches(
        edit_distance.dtw_path(edit_distance.edit_distance_table(first, second)), len(second)
    )
    return len(second)


def end_to_end(spans: Sequence[torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
    """All texts as one, so that all are aligned at once."""
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text.encode()))
    return torch.cat([one + start for one, start in zip(spans, starts, strict=False)])


def clocked(work: Callable[[], Any], *, times: int = 3) -> tuple[float, Any]:
    """The least seconds of the processor in a few runs, and what came out."""
    best, found = float("inf"), None
    for _ in range(times):
        start = time.process_time()
        found = work()
        best = min(best, time.process_time() - start)
    return best, found


def kinds(student: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[str]]]:
    """Each kind of text that there is here."""
    yield "English (docstrings)", some(load_docstrings())
    library = Path(sysconfig.get_path("stdlib"))
    yield "code (Python)", some(path.read_text("utf-8", "replace") for path in sorted(list_modules(library)))
    yield "emoji", [EMOJI * 20] * 20
    if not (folder := os.environ.get("POTSTILL_DATA")):
        return
    chats = json.loads(unzipped(Path(folder) / "instruct/hiyouga__LLaMA-Factory/data/alpaca_en_demo.json.gz"))
    yield "chat (English)", some(chat(one, student) for one in chats)
    for name, language in (("Chinese", "zho-CN"), ("Japanese", "jpn"), ("Korean", "kor"), ("German", "deu")):
        path = f"translation/MicrosoftTranslator__NTREX/NTREX-128/newstest2019-ref.{language}.txt.gz"
        yield name, some(unzipped(Path(folder) / path).splitlines())


def some(texts: Any) -> list[str]:
    """The first texts, up to so many characters."""
    taken, left = [], CHARACTERS
    for text in texts:
        if text and left > 0:
            taken.append(text[:LONGEST])
            left -= len(taken[-1])
    return taken


def unzipped(path: Path) -> str:
    """The text of a gzipped file."""
    return gzip.decompress(path.read_bytes()).decode()


def chat(one: dict[str, str], student: PreTrainedTokenizerBase) -> str:
    """A question and its answer as the student's template writes them."""
    asked = {"role": "user", "content": f"{one['instruction']}\n{one['input']}".strip()}
    said = {"role": "assistant", "content": one["output"]}
    return str(student.apply_chat_template([asked, said], tokenize=False))


def tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """That of a folder or a GGUF file, of `smollm2`, or one trained here."""
    if name is None:
        return trained()
    path = load.get_packaged_path() if name == "smollm2" else Path(name)
    if path.suffix == ".gguf":
        return gguf.load_tokenizer(path)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--student", default="smollm2", help="a folder, a GGUF file or smollm2")
    parser.add_argument("--teacher", help="a folder or a GGUF file; without it, a tokenizer trained here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
