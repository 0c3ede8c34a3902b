"""`potstill serve` as a process of its own, on a free port of this machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.tiny import byte_tokenizer, random_llama


class Server(NamedTuple):
    """Where a model is served, and what lies there."""

    url: str
    model: Path
    process: subprocess.Popen[str]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny Llama of context 512, served in float32 for all tests of a session."""
    folder = tmp_path_factory.mktemp("served") / "teacher"
    tokenizer = byte_tokenizer()
    random_llama(tokenizer, context=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with serving(folder) as one:
        yield one


@contextmanager
def serving(folder: Path, *, port: int = 0) -> Iterator[Server]:
    """Serves the model in `folder` until the block ends."""
    options = ["--port", str(port), "--dtype", "float32", "--max-logprobs", "-1", "--json"]
    call = [sys.executable, "-m", "potstill", "serve", str(folder), *options]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said, process.stderr.read() if process.stderr else ""
            yield Server(json.loads(said)["url"], folder, process)
        finally:
            process.terminate()
            process.communicate(timeout=90)
