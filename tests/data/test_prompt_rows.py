"""Prompts with their rows: the formats, what a reward can read, who is held out, and one pack for each."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError, UsageError
from potstill.core.types import IGNORE
from potstill.data.corpus import Corpus
from potstill.data.packing import collate
from potstill.data.prompt_rows import load_prompts, pack_prompts, read_prompts
from potstill.data.prompt_schema import recognize_prompts
from potstill.data.prompts import PromptTokenizer

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def turns_of(row: dict[str, Any], **columns: str) -> list[tuple[str, str]]:
    document = recognize_prompts(row, "the row", columns=columns or None).to_document(row)
    assert json.loads(document["row"]) == row
    return [(turn["role"], turn["content"]) for turn in document["prompt"]]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "answer": "4"},
        {"question": "2+2?", "answer": "4"},
        {"problem": "2+2?", "solution": "It is 4.", "answer": "4"},
        {"instruction": "2+2?", "output": "4", "input": ""},
        {"input": "2+2?"},
        {"prompt": [USER], "answer": "4"},
        {"messages": [USER]},
        {"messages": [USER, ANSWER], "language": "en"},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_the_prompt_of_every_format_is_the_question_without_its_answer(row: dict[str, Any]) -> None:
    assert turns_of(row) == [("user", "2+2?")]


def test_a_system_prompt_a_history_and_a_context_belong_to_the_prompt() -> None:
    row = {"query": "And 3+3?", "system": "Be brief.", "history": [["2+2?", "4"]], "context": "Sums."}
    history = [("user", "2+2?"), ("assistant", "4")]
    assert turns_of(row) == [("system", "Be brief."), *history, ("user", "And 3+3?\n\nSums.")]
    assert turns_of({"messages": [USER, ANSWER, USER, ANSWER]}) == [*history, ("user", "2+2?")]


def test_stated_columns_take_precedence() -> None:
    row = {"prompt": "no", "problem_de": "2+2?", "rules": "Be brief."}
    assert turns_of(row, prompt="problem_de", system="rules") == [("system", "Be brief."), ("user", "2+2?")]


def test_rows_without_a_prompt_and_columns_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="no prompt; name it prompt, instruction"):
        recognize_prompts({"answer": "4"}, "the row")
    with pytest.raises(UsageError, match="do not define a prompt"):
        recognize_prompts({"answer": "4"}, "the row", columns={"response": "answer"})


def write_sums(folder: Path, count: int = 60) -> str:
    rows = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(count)]
    (file := folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_prompts_are_held_out_by_prompt_and_keep_their_rows(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = write_sums(tmp_path)
    train, validation = (load_prompts(data, split=split) for split in ("train", "validation"))
    assert train.kind == "prompts"
    assert len(train) + len(validation) == 60
    prompts = read_prompts(validation.documents, PromptTokenizer(tiny_tokenizer), columns=["answer"])
    for prompt in prompts:
        assert f"{int(prompt.row['answer']) - 1}+1?" == prompt.text == prompt.row["prompt"]
        decoded = tiny_tokenizer.decode(prompt.input_ids)
        assert decoded == f"<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n"


def test_a_stream_of_prompts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Corpus("owner/name", "prompts", IterableDataset.from_generator(lambda: iter([])), None, None, {})
    monkeypatch.setattr("potstill.data.prompt_rows.load_mixture", lambda *names, **options: stream)
    with pytest.raises(UsageError, match="owner/name is streamed, and a part of its prompts is held out; download it"):
        load_prompts("owner/name")


def test_a_row_without_a_column_that_the_reward_reads_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = load_prompts(write_sums(tmp_path), split="all").documents
    with pytest.raises(DataError, match="has no 'language', which the reward reads"):
        read_prompts(documents, PromptTokenizer(tiny_tokenizer), columns=["answer", "language"])


def test_each_prompt_is_a_pack_with_the_number_of_its_row(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = load_prompts(write_sums(tmp_path), split="all").documents
    prompts = read_prompts(documents, PromptTokenizer(tiny_tokenizer))
    packs = pack_prompts(prompts)
    assert len(packs) == len(prompts) == 60
    batch = collate([packs[7], packs[3]])
    assert batch["rows"].tolist() == [7, 3]
    assert batch["input_ids"][0].tolist() == [*prompts[7].input_ids, *prompts[3].input_ids]
    assert (batch["labels"] == IGNORE).all()
    with pytest.raises(DataError, match="no prompt"):
        pack_prompts([])
