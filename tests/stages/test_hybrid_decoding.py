"""A saved model with recurrences is generated from, chatted with, served and advised on as any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decode.families import make_hybrid
from tests.serving import open_client
from tests.stages.world import saved
from transformers import PreTrainedTokenizerFast

import potstill
from potstill.decode.drafters.options import DraftOptions
from potstill.decode.request import DecodeRequest
from potstill.models.load import LoadedModel, load_model
from potstill.stages.chat import Chat
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.generate_text import generate_text


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two recurrences and two attentions, one with a window."""
    model = make_hybrid("deltanet", vocabulary=len(tiny_tokenizer), context=512, dtype=torch.float32)
    return saved(tmp_path / "hybrid", model, tiny_tokenizer)


def write(loaded: LoadedModel, request: DecodeRequest) -> list[int]:
    """The definition: the likeliest tokens one by one, each after a text that is read anew."""
    ids: list[int] = list(request.prompt)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            ids.append(int(loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(request.prompt) :]


def test_generate_writes_the_likeliest_tokens_with_and_without_drafts(folder: Path) -> None:
    loaded = load_model(folder)
    prompt = loaded.tokenizer("a wash a wash").input_ids
    expected = loaded.tokenizer.decode(
        loaded.model.generate(torch.tensor([prompt]), max_new_tokens=16)[0, len(prompt) :]
    )
    for draft in (None, "lookup"):
        drafts = DraftOptions() if draft is None else DraftOptions(draft=draft, draft_length="3")
        options = AnswerOptions(device="cpu", dtype="float32", raw=True, max_tokens=16, drafts=drafts)
        answer = generate_text(str(folder), "a wash a wash", options)
        assert answer["text"] == expected
        assert (draft is None) == (answer["drafted"] == 0)


def test_each_turn_of_a_chat_is_answered_as_if_it_were_read_anew(folder: Path) -> None:
    chat = Chat(str(folder), AnswerOptions(device="cpu", dtype="float32", max_tokens=8))
    for question in ("Hi", "Who?", "Where?"):
        answer = chat.ask(question)
        list(answer)
        loaded = chat.generator.loaded
        anew = loaded.tokenizer.decode(write(loaded, answer.request), skip_special_tokens=True)
        assert answer.text
        assert anew.startswith(answer.text)  # which may have ended at a stop token


def test_serve_answers_several_prompts_at_once_and_continues_one(folder: Path) -> None:
    loaded = load_model(folder)
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    prompts = ["a wash", "the still boils over a wash", "its"]

    def complete(client: Any, prompt: str | list[str]) -> list[str]:
        answer = client.post("/v1/completions", json={**body, "prompt": prompt})
        return [choice["text"] for choice in answer.json()["choices"]]

    with open_client(loaded) as client:
        together = complete(client, prompts)
        assert [complete(client, prompt)[0] for prompt in prompts] == together
        longer = [prompt + " and the wash" for prompt in prompts]
        continued = [complete(client, prompt)[0] for prompt in longer]
    with open_client(loaded) as client:
        assert complete(client, longer) == continued


@pytest.mark.slow
def test_advice_finds_no_difference_between_drafts_and_plain_decoding(folder: Path, pairs: Path) -> None:
    options: dict[str, Any] = {"draft_length": "2", "prompts": 1, "max_tokens": 8, "runs": 1, "dtype": "float32"}
    result = potstill.advise(folder, data=pairs, draft=["lookup", "skip:1"], **options)
    assert [each["draft"] for each in result.settings] == ["lookup", "skip:1"]
    assert result.differences == []
