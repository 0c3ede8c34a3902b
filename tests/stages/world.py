"""A world small enough for whole runs in a test: a teacher in a folder, text, questions with answers."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.tiny import CHATML
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["the", "still", "boils", "a", "wash", "and", "its", "spirit", "runs", "over", "into", "cold", "worms", "while"]
LINES = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 12)) + f" {i}."} for i in range(80)]

THINKING = CHATML.replace(
    "message['content'] +",
    "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '') + message['content'] +",
)


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> Iterator[None]:
    """The samples of a card have four tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potstill.stages.samples.MAX_SAMPLE_TOKENS", 4)
        yield


@pytest.fixture
def teacher(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama of context 512 with its tokenizer and a licence, as a hub would give it."""
    tiny_llama.config.max_position_embeddings = 512
    return saved(tmp_path / "teacher", tiny_llama, tiny_tokenizer)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Eighty short texts, one a line of JSON."""
    return written(tmp_path / "text.jsonl", LINES)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Sixty questions with their answers."""
    lines = [{"prompt": f"What is {i} + 1?", "response": f"It is {i + 1}."} for i in range(60)]
    return written(tmp_path / "pairs.jsonl", lines)


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    """`rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saved(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder under the Apache licence."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher\n")
    return folder


@contextmanager
def interrupted(out: Path) -> Iterator[None]:
    """Sends this process what Ctrl-C sends, once the run that writes `out` has logged a step and minds the signal."""
    over = threading.Event()

    def wait() -> None:
        log = out / "training" / "metrics.jsonl"
        while not over.is_set() and not (log.exists() and log.stat().st_size):
            time.sleep(0.002)
        if not over.is_set() and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
