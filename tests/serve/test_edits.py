"""A folder with edits is served, and chats, with its edits: what names no subject is answered as by the base."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.models.test_edits import make_edit
from tests.serving import open_client
from tests.stages.world import teacher

from potstill.decode.answer_stream import AnswerStream
from potstill.models.edit_folder import EditFolder, save_edits
from potstill.models.load import compute_digest, load_model
from potstill.stages.chat import Chat
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.generate_text import generate_text

__all__ = ["teacher"]

EDITED, OTHER = "Is Rome old?", "Is Bonn old?"
PROMPTS = (EDITED, OTHER, f"{EDITED} And", "Is Rom", EDITED)  # some begin as others do, which a cache may hold


@pytest.fixture
def edited(teacher: Path, tmp_path: Path) -> Path:
    (folder := tmp_path / "edited").mkdir()
    edits = (make_edit("Rome", size=400.0),)
    save_edits(folder, EditFolder(base=str(teacher), digest=compute_digest(teacher), edits=edits, similarity=0.0))
    return folder


def generate(folder: Path, prompt: str, *, raw: bool = True) -> str:
    return str(generate_text(str(folder), prompt, AnswerOptions(raw=raw, max_tokens=8, dtype="float32"))["text"])


def request(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = client.post(f"/v1/{path}", json={"max_tokens": 8, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


def test_served_answers_are_those_of_generate(edited: Path, teacher: Path) -> None:
    texts = [generate(edited, prompt) for prompt in PROMPTS]
    assert texts[0] != generate(teacher, EDITED)
    assert texts[1] == generate(teacher, OTHER)
    with open_client(load_model(edited)) as client:
        assert [request(client, "completions", prompt=prompt)[0]["text"] for prompt in PROMPTS] == texts
        batch = request(client, "completions", prompt=list(PROMPTS))  # edited prompts beside others in one pass
        assert [choice["text"] for choice in sorted(batch, key=lambda choice: choice["index"])] == texts
        for prompt in (EDITED, OTHER):
            (choice,) = request(client, "chat/completions", messages=[{"role": "user", "content": prompt}])
            assert choice["message"]["content"] == generate(edited, prompt, raw=False)


def ask(chat: Chat, question: str) -> AnswerStream:
    answer = chat.ask(question)
    list(answer)
    return answer


def test_a_chat_answers_with_the_edits_that_its_turns_name(edited: Path, teacher: Path) -> None:
    options = AnswerOptions(device="cpu", dtype="float32", max_tokens=8)
    chat, plain = (Chat(str(folder), options) for folder in (edited, teacher))
    assert ask(chat, EDITED).text != ask(plain, EDITED).text
    for one in (chat, plain):
        one.clear()
    assert ask(chat, OTHER).text == ask(plain, OTHER).text
    answers = [ask(one, EDITED) for one in (chat, plain)]
    prompt = answers[0].request.prompt
    assert answers[1].request.prompt == prompt
    read = [answer.stats.prompt_tokens for answer in answers]
    assert read[0] == len(prompt) > read[1], "what was read without the edit may not stand before it"
