"""A student that potstill exports is served by real vLLM, by the command that potstill prints, with equal tokens."""

import json
import os
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.gguf_export.test_file import build, merging_tokenizer
from transformers import LlamaConfig

import potstill
from potstill.models.load import load_model
from potstill.models.saving import save_model_folder

SIZES = {  # heads of 64, as vLLM's kernels want
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FLAGS = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 4 --max-logprobs 20 --host 127.0.0.1 --port"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_SECONDS = 600


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


@contextmanager
def serve(command: str, log: Path) -> Iterator[str]:
    """The address of a server that `command` starts, with the `vllm` of `POTSTILL_VLLM`."""
    python = os.environ.get("POTSTILL_VLLM")
    if not python:
        pytest.skip("needs vLLM: name the Python of an environment that has it in POTSTILL_VLLM")
    program, *arguments = shlex.split(command)
    port = free_port()
    call = [str(Path(python).with_name(program)), *arguments, *FLAGS.split(), str(port)]
    with log.open("w") as output:
        environment = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(call, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_vllm_serves_an_exported_student_with_its_greedy_tokens(tmp_path: Path) -> None:
    save_model_folder(build(LlamaConfig(**SIZES)), merging_tokenizer(), tmp_path / "source")
    result = potstill.export(tmp_path / "source", to="hf", save_dtype="float32", out=tmp_path / "student")
    ids = list(range(3, 40))
    with serve(result["commands"]["vLLM"], tmp_path / "log.txt") as address:
        body = {"model": "student", "prompt": ids, "max_tokens": 100, "temperature": 0, "logprobs": 1}
        choice = post(f"{address}/completions", {**body, "ignore_eos": True, "return_token_ids": True})["choices"][0]
    tokens, served = choice["token_ids"], torch.tensor(choice["logprobs"]["token_logprobs"])
    model = load_model(tmp_path / "student").model
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert len(tokens) == 100
    assert (served - own).abs().max() < 1e-3
    assert logits.argmax(-1).tolist() == tokens
