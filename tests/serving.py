"""`potstill serve` on a free port of this machine: as a process of its own, or in a thread of this one."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from fastapi.testclient import TestClient
from tests.tiny import byte_tokenizer, random_llama

from potstill.models.load import LoadedModel
from potstill.serve.app import create_app
from potstill.serve.options import ServeLimits
from potstill.serve.served_model import ServedModel
from potstill.serve.server import listen, make_server, open_socket


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
def serving(folder: Path, *more: str, port: int = 0) -> Iterator[Server]:
    """Serves the model in `folder` until the block ends."""
    options = ["--port", str(port), "--dtype", "float32", "--max-logprobs", "-1", "--json"]
    call = [sys.executable, "-m", "potstill", "serve", str(folder), *options, *more]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said, process.stderr.read() if process.stderr else ""
            yield Server(json.loads(said)["url"], folder, process)
        finally:
            process.terminate()
            process.communicate(timeout=90)


def load_tiny(*, context: int = 256) -> LoadedModel:
    """The tiny Llama, whose embedding has more rows than the tokenizer has ids."""
    tokenizer = byte_tokenizer()
    model = random_llama(tokenizer, context=context)
    model.resize_token_embeddings(300, mean_resizing=False)
    return LoadedModel(model, tokenizer, "tiny", Path("tiny"), None, "")


@contextmanager
def open_client(loaded: LoadedModel | None = None, **options: Any) -> Iterator[TestClient]:
    """A client of the application in this process, without a network; limits are options too."""
    app = create_app(loaded or load_tiny(), name="tiny", **split_limits(options))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


class ThreadServer(NamedTuple):
    """A server in a thread of this process, and the model that it serves."""

    url: str
    served: ServedModel

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def wait_until_idle(self) -> None:
        """Waits until no answer is in the engine."""
        wait_for(lambda: self.served.worker.num_answers == 0)


@contextmanager
def serving_in_thread(*, step_seconds: float = 0.0, context: int = 256, **options: Any) -> Iterator[ThreadServer]:
    """Serves the tiny model; each step of its engine takes `step_seconds` longer."""
    app = create_app(load_tiny(context=context), name="tiny", **split_limits(options))
    served = app.state.served
    slow_down(served, step_seconds)
    with open_socket("127.0.0.1", 0) as listener:
        url = listen(listener, "127.0.0.1")
        one = make_server(uvicorn.Config(app, log_level="critical"), served.worker)
        thread = threading.Thread(target=one.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: one.started)
            yield ThreadServer(url, served)
        finally:
            one.should_exit = True
            thread.join()


def split_limits(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `create_app`, with those of `ServeLimits` in one."""
    limits = {name: options.pop(name) for name in list(options) if name in ServeLimits.__dataclass_fields__}
    return {**options, "limits": ServeLimits(**limits)}


def slow_down(served: ServedModel, seconds: float) -> None:
    """Each step of the engine takes `seconds` longer."""
    engine = served.worker._engine
    step = engine.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    if seconds:
        engine.step = slow_step  # type: ignore[method-assign]


def wait_for(condition: Any, *, seconds: float = 20.0) -> None:
    """Returns once the condition holds, and fails if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)
