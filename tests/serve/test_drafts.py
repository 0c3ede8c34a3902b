"""Drafts change no greedy answer of the server, and its metrics count them."""

from functools import partial
from typing import Any

from tests.serving import load_tiny, open_client

from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import make_speculation

BODY = {"prompt": "a wash a wash a wash a wash", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "logprobs": 1}


def read_count(metrics: str, name: str) -> float:
    """The value of a counter."""
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"potstill:{name}_total{{")]
    return float(line.rsplit(" ", 1)[1])


def test_drafts_change_no_greedy_answer_and_are_counted() -> None:
    loaded = load_tiny()
    options = DraftOptions(draft="lookup", draft_length="4")
    speculate: Any = partial(make_speculation, tokenizer=loaded.tokenizer, options=options)
    with open_client(loaded) as plain, open_client(loaded, speculate=speculate) as drafting:
        expected, (choice,) = (
            client.post("/v1/completions", json=BODY).json()["choices"] for client in (plain, drafting)
        )
        metrics = drafting.get("/metrics").text
    assert choice["text"] == expected[0]["text"]
    assert choice["logprobs"]["tokens"] == expected[0]["logprobs"]["tokens"]
    assert read_count(metrics, "spec_decode_num_accepted_tokens") > 0
    assert read_count(metrics, "spec_decode_num_accepted_tokens") <= read_count(metrics, "spec_decode_num_draft_tokens")
    assert read_count(metrics, "generation_tokens") == 60
