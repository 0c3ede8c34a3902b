"""Which share of a text two tokenizers split alike, and what the alignment costs.

For each kind of text: the share of the student's tokens that cover the same bytes as a token of the teacher (exact),
that begin where one of the teacher's begins (same context), and that are in a group of merged spans; then the
student's tokens per second of each stage. Without `--teacher`, a tokenizer of SentencePiece's kind with 8,000 tokens is
trained on the docstrings of the standard library. Chats, Chinese, Japanese and Korean come from `$POTSTILL_DATA` and
are skipped without it. Chats use SmolLM2's template for both, whose markers the teacher reads as plain text.

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
from potstill.data.docstrings import list_modules, load_library
from potstill.models import gguf, locate
from potstill.models.tokenizers.token_bytes import TokenBytes, match_tokens, read_token_bytes
from potstill.ops import align, edit_distance
from setting.document import command_line, document, refuse_on_red
from setting.tokenizer import train_tokenizer

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
    """Refuses if a test fails, measures every kind of text, prints one document."""
    options = parse_arguments()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    student, teacher = load_tokenizer(options.student), load_tokenizer(options.teacher)
    sides = (student, read_token_bytes(student)), (teacher, read_token_bytes(teacher))
    shared = int((match_tokens(sides[0][1], sides[1][1]) >= 0).sum())
    vocabulary = {"student": len(student), "teacher": len(teacher), "student ids that the teacher has": shared}
    texts = {kind: measure_texts(chosen, *sides) for kind, chosen in list_texts(student)}
    met = {GOAL: all(entry["tokens a CPU second"]["tokenised and located"] >= 25_000 for entry in texts.values())}
    print(document("alignment", {"vocabulary": vocabulary, "texts": texts}, met))


def measure_texts(texts: Sequence[str], student: Side, teacher: Side) -> dict[str, Any]:
    """Shares over all `texts`, and rates in the student's tokens per second."""
    read, student_tokens = time_cpu(lambda: locate_tokens(texts, *student))
    _, teacher_tokens = time_cpu(lambda: locate_tokens(texts, *teacher))
    bare, _ = time_cpu(lambda: student[0](list(texts), verbose=False))
    first, second = (
        concatenate_spans([entry.spans for entry in side], texts) for side in (student_tokens, teacher_tokens)
    )
    seconds, pairs = time_cpu(lambda: align.match_spans(first, second))
    merging, groups = time_cpu(lambda: align.merge_spans(first, second))
    real = first[:, 0] < first[:, 1]
    tokens = len(first)
    text_pairs = list(zip(student_tokens, teacher_tokens, strict=True))[:20]
    warping, warped = time_cpu(
        lambda: sum(align_by_edit_distance(a.ids, b.ids, student[1], teacher[1]) for a, b in text_pairs)
    )
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


def align_by_edit_distance(
    student_tokens: torch.Tensor, teacher_tokens: torch.Tensor, student: TokenBytes, teacher: TokenBytes
) -> int:
    """Pairs the tokens of one text by minimum edit distance; returns the number of the student's tokens."""
    first, second = (
        [token_bytes.by_id[i].strip() for i in ids.tolist()]
        for token_bytes, ids in ((teacher, teacher_tokens), (student, student_tokens))
    )
    edit_distance.find_single_matches(
        edit_distance.dtw_path(edit_distance.edit_distance_table(first, second)), len(second)
    )
    return len(second)


def concatenate_spans(spans: Sequence[torch.Tensor], texts: Sequence[str]) -> torch.Tensor:
    """The spans of all texts as those of one text, so that all are aligned at once."""
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text.encode()))
    return torch.cat([entry + start for entry, start in zip(spans, starts, strict=False)])


def time_cpu(work: Callable[[], Any], *, times: int = 3) -> tuple[float, Any]:
    """The least processor seconds of a few runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(times):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return best, result


def list_texts(student: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[str]]]:
    """Each kind of text that is available."""
    yield "English (docstrings)", take_texts(load_library().texts)
    library = Path(sysconfig.get_path("stdlib"))
    yield "code (Python)", take_texts(path.read_text("utf-8", "replace") for path in sorted(list_modules(library)))
    yield "emoji", [EMOJI * 20] * 20
    if not (folder := os.environ.get("POTSTILL_DATA")):
        return
    chats = json.loads(read_gzip(Path(folder) / "instruct/hiyouga__LLaMA-Factory/data/alpaca_en_demo.json.gz"))
    yield "chat (English)", take_texts(render_chat(entry, student) for entry in chats)
    for name, language in (("Chinese", "zho-CN"), ("Japanese", "jpn"), ("Korean", "kor"), ("German", "deu")):
        path = f"translation/MicrosoftTranslator__NTREX/NTREX-128/newstest2019-ref.{language}.txt.gz"
        yield name, take_texts(read_gzip(Path(folder) / path).splitlines())


def take_texts(texts: Any) -> list[str]:
    """The first texts, up to `CHARACTERS` characters."""
    taken, left = [], CHARACTERS
    for text in texts:
        if text and left > 0:
            taken.append(text[:LONGEST])
            left -= len(taken[-1])
    return taken


def read_gzip(path: Path) -> str:
    """The text of a gzipped file."""
    return gzip.decompress(path.read_bytes()).decode()


def render_chat(entry: dict[str, str], student: PreTrainedTokenizerBase) -> str:
    """A question and its answer, rendered by the student's template."""
    question = {"role": "user", "content": f"{entry['instruction']}\n{entry['input']}".strip()}
    answer = {"role": "assistant", "content": entry["output"]}
    return str(student.apply_chat_template([question, answer], tokenize=False))


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a GGUF file or `smollm2`; without a name, one trained here."""
    if name is None:
        return train_tokenizer()
    path = locate.get_packaged_path() if name == "smollm2" else Path(name)
    if path.suffix == ".gguf":
        return gguf.load_tokenizer(path)
    result: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return result


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--student", default="smollm2", help="a folder, a GGUF file or smollm2")
    parser.add_argument("--teacher", help="a folder or a GGUF file; without it, a tokenizer trained here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
