"""Prompts that are rewritten before they are answered: translated by drawn languages, or new ones after examples."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.test_generate_dataset import rows, speaker
from tests.stages.world import written
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError, Interrupted, UsageError
from potstill.data.corpus import load_corpus
from potstill.evaluate.similarity import PromptPool
from potstill.stages import answer_writer
from potstill.stages import generate_dataset as answering
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.rewrite_prompts import (
    NO_FORM,
    REPEATED,
    UNTRANSLATED,
    Prompt,
    draw_examples,
    draw_language,
    get_language_name,
    make_request,
    parse_prompt,
    read_prompt,
    replace_prompt,
)

__all__ = ["speaker"]

Answer = Callable[[str, float], str]
TRANSLATE: Any = {"translate": True, "translate_prompt": "In {language}: {text}"}
INSTRUCT: Any = {"instruct_prompt": "Like these:\n\n{examples}\n\nOne more:"}
MODEL = {"max_tokens": 90, "dtype": "float32"}


@pytest.fixture
def config(speaker: Path, pairs: Path) -> GenerateDatasetConfig:
    return GenerateDatasetConfig(model=str(speaker), data=str(pairs), **MODEL)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[Answer], list[str]]:
    """Lets a function of the prompt's text and its first random number write the answers; returns the prompts."""

    def install(answer: Answer) -> list[str]:
        prompts: list[str] = []

        def generate(_: Any, ids: Sequence[torch.Tensor], noise: torch.Tensor, *__: Any) -> list[list[int]]:
            texts = [read_user(tiny_tokenizer.decode(prompt)) for prompt in ids]
            prompts.extend(texts)
            answers = [answer(text, float(row[0])) for text, row in zip(texts, noise, strict=True)]
            return [[*tiny_tokenizer.encode(text), tiny_tokenizer.eos_token_id] for text in answers]

        monkeypatch.setattr(answer_writer, "generate", generate)
        return prompts

    return install


def read_user(text: str) -> str:
    """The user's turn of a rendered prompt."""
    return text.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def translate_or_answer(prompt: str, _: float) -> str:
    """A model whose translations name their language, and whose answers repeat the prompt."""
    language, separator, text = prompt.removeprefix("In ").partition(": ")
    return f"({language}) {text}" if separator and prompt.startswith("In ") else f"answer to {prompt}"


def test_languages_are_drawn_by_their_shares_the_seed_and_the_number(config: GenerateDatasetConfig) -> None:
    config = replace(config, **TRANSLATE, languages="en:2,zh:1, fr:1")
    drawn = [draw_language(config, number) for number in range(4000)]
    counts = Counter(drawn)
    assert [counts[name] / 4000 for name in ("en", "zh", "fr")] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert drawn == [draw_language(config, number) for number in range(4000)]
    assert drawn != [draw_language(replace(config, seed=2), number) for number in range(4000)]


def test_prompts_are_translated_first_and_answered_in_their_language(
    config: GenerateDatasetConfig, script: Callable[[Answer], list[str]], pairs: Path, tmp_path: Path
) -> None:
    asked = script(translate_or_answer)
    config = replace(config, **TRANSLATE, languages="en:0.4,fr:0.3,Klingon:0.3")
    card = config.run(tmp_path / "out")
    prompts = {document["prompt"] for document in load_corpus(str(pairs)).documents}
    answered = rows(tmp_path / "out")
    assert len(answered) == len(prompts) == sum(card["details"]["languages"].values())
    assert card["details"]["languages"] == dict(Counter(row["language"] for row in answered).most_common())
    for row in answered:
        name = {"en": "", "fr": "(French) ", "Klingon": "(Klingon) "}[row["language"]]
        assert row["prompt"].startswith(name)
        assert row["prompt"].removeprefix(name) in prompts
        assert row["response"] == f"answer to {row['prompt']}"
    assert {row["language"] for row in answered} == {"en", "fr", "Klingon"}
    assert sum(prompt.startswith("In ") for prompt in asked) == sum(row["language"] != "en" for row in answered)
    assert load_corpus(str(tmp_path / "out")).kind == "pairs"


def test_of_a_chat_the_first_question_is_translated(
    config: GenerateDatasetConfig, script: Callable[[Answer], list[str]], tmp_path: Path
) -> None:
    script(translate_or_answer)
    chats: list[Any] = [
        {"messages": [{"role": r, "content": f"{r} {n}"} for r in ("system", "user", "assistant", "user", "assistant")]}
        for n in range(30)
    ]
    config = replace(config, **TRANSLATE, languages="de:1", data=str(written(tmp_path / "chats.jsonl", chats)))
    config.run(tmp_path / "out")
    row = rows(tmp_path / "out")[0]
    number = row["messages"][0]["content"].removeprefix("system ")
    assert row["messages"][1:] == [
        {"role": "user", "content": f"(German) user {number}"},
        {"role": "assistant", "content": f"answer to (German) user {number}"},
    ]
    assert row["language"] == "de"


def test_a_translation_that_is_none_or_repeats_another_is_left_out_and_counted(
    config: GenerateDatasetConfig, script: Callable[[Answer], list[str]], tmp_path: Path
) -> None:
    def answer(prompt: str, _: float) -> str:
        text = prompt.removeprefix("In French: ")
        return text.upper() if text[-2] in "02468" else "Bonjour" if text != prompt else "Oui"

    script(answer)
    data: list[Any] = [{"prompt": f"Say {n}.", "response": "a"} for n in range(40)]
    config = replace(config, **TRANSLATE, languages="fr:1", data=str(written(tmp_path / "data.jsonl", data)))
    card = config.run(tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert (row["prompt"], row["response"]) == ("Bonjour", "Oui")
    asked = [document["prompt"] for document in load_corpus(config.data).documents]
    even = sum(prompt[-2] in "02468" for prompt in asked)
    assert card["details"]["left_out"] == {UNTRANSLATED: even, REPEATED: len(asked) - even - 1}


def write_task(prompt: str, number: float) -> str:
    """A model that writes a task after examples, or the same one again, or none; and answers other prompts."""
    if not prompt.startswith("Like these:"):
        return f"answer to {prompt}"
    role = "Role: a baker\n" if "Role:" in prompt else ""
    words = " ".join(f"{digit}{place}" for place, digit in enumerate(f"{number:.8f}"[2:]))
    tasks = (f"{role}Instruction: Name {words}\nInput: none", f"{role}Instruction: Sing\nInput: loud", "I cannot.")
    return tasks[int(number * 1000) % 3]


def test_new_prompts_are_written_after_examples_and_answered(
    config: GenerateDatasetConfig, script: Callable[[Answer], list[str]], pairs: Path, tmp_path: Path
) -> None:
    asked = script(write_task)
    card = replace(config, self_instruct=20, **INSTRUCT).run(tmp_path / "out")
    answered = rows(tmp_path / "out")
    assert len(answered) == len({row["prompt"] for row in answered}) == 20
    assert sum(row["prompt"] == "Sing\n\nloud" for row in answered) == 1
    assert all(row["response"] == f"answer to {row['prompt']}" for row in answered)
    assert card["details"]["new_prompts"] == {"written": 64, "taken": 20}
    assert min(card["details"]["left_out"][reason] for reason in (REPEATED, NO_FORM)) > 5
    seeds = {document["prompt"] for document in load_corpus(str(pairs)).documents}
    first_request = next(prompt for prompt in asked if prompt.startswith("Like these:"))
    examples = first_request.removeprefix("Like these:\n\n").removesuffix("\n\nOne more:").split("\n\n")
    assert len(examples) == 4
    assert {example.removeprefix("Instruction: ").removesuffix("\nInput: none") for example in examples} <= seeds


def test_the_role_of_a_seed_is_its_system_prompt_and_so_is_that_of_a_new_prompt(
    config: GenerateDatasetConfig, script: Callable[[Answer], list[str]], tmp_path: Path
) -> None:
    asked = script(write_task)
    seeds: list[Any] = [
        {"role": f"nurse {n}", "instruction": f"Ask {n}", "input": f"about {n}", "output": "..."} for n in range(30)
    ]
    data = str(written(tmp_path / "seeds.jsonl", seeds))
    columns = "system=role,prompt=instruction,context=input,response=output"
    options = replace(config, self_instruct=3, **INSTRUCT, data=data, columns=columns, **TRANSLATE, languages="fr:1")
    replace(options, translate_prompt="Like these:{language}{text}").run(tmp_path / "out")
    request = next(prompt for prompt in asked if "Role: nurse" in prompt)
    number = request.split("Role: nurse ")[1].split("\n")[0]
    assert f"Role: nurse {number}\nInstruction: Ask {number}\nInput: about {number}\n\n" in request
    messages = rows(tmp_path / "out")[0]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "a baker"


def test_a_model_that_writes_no_prompt_is_refused(
    config: GenerateDatasetConfig, script: Callable[[Answer], list[str]], tmp_path: Path
) -> None:
    script(lambda prompt, _: "I cannot.")
    with pytest.raises(DataError, match=rf"no answer that could be trained on: {{'{NO_FORM}': 64}}"):
        replace(config, self_instruct=5, **INSTRUCT).run(tmp_path / "out")


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_stage_continues_to_the_same_prompts(
    config: GenerateDatasetConfig,
    script: Callable[[Answer], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    monkeypatch.setattr(answering, "PROMPTS_PER_PART", 8)
    options = replace(config, self_instruct=9, **INSTRUCT, **TRANSLATE, languages="en:0.5,fr:0.5", batch=8)

    def answer(prompt: str, number: float) -> str:
        return (write_task if prompt.startswith("Like these:") else translate_or_answer)(prompt, number)

    script(answer)
    options.run(tmp_path / "straight")
    generate, calls = answer_writer.generate, iter(range(100))

    def stopped(*arguments: Any) -> list[list[int]]:
        if next(calls) == stop:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(answer_writer, "generate", stopped)
    with pytest.raises(Interrupted, match="--resume"):
        options.run(tmp_path / "out")
    with pytest.raises(UsageError, match="begun with languages"):
        replace(options, languages="en:1").run(tmp_path / "out", resume=True)
    card = options.run(tmp_path / "out", resume=True)
    assert rows(tmp_path / "out") == rows(tmp_path / "straight")
    whole = json.loads((tmp_path / "straight" / "card.json").read_text())
    assert card["details"] == whole["details"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Role: a cook\nInstruction: Boil it.\nInput: an egg", Prompt("a cook", "Boil it.\n\nan egg")),
        ("Sure!\n\n**Instruction:** Boil\nit.\n**Input:** None.", Prompt("", "Boil\nit.")),
        ("instruction : Boil it.\nInput: <noinput>", Prompt("", "Boil it.")),
        ("Instruction: Boil it.\n\nInstruction: Fry it.", Prompt("", "Boil it.")),
        ("- Instruction: 煮它。\n- Input: 鸡蛋", Prompt("", "煮它。\n\n鸡蛋")),
        ("Question: What boils?\nOutput: None", Prompt("", "What boils?")),
        ("Instructions: Boil it.\nAnswer: done\nInput: an egg", Prompt("", "Boil it.")),
        ("Task: Cooking\nInstruction: Boil it.\nInput: none", Prompt("", "Boil it.")),
        ("Instruction: Answer.\nQuestion: What boils?", Prompt("", "Answer.\nQuestion: What boils?")),
        ("Instruction:\nInput: an egg", None),
        ("I cannot do that.", None),
    ],
)
def test_a_new_prompt_is_read_in_the_form_of_the_examples(text: str, expected: Prompt | None) -> None:
    assert parse_prompt(text) == expected


def test_examples_are_distinct_prompts_and_the_last_may_be_a_new_one() -> None:
    seeds, accepted = [Prompt("", f"seed {n}") for n in range(9)], [Prompt("", "new")]
    assert draw_examples(seeds[:2], [], seed=1, number=0) in (seeds[:2], seeds[1::-1])
    drawn = [draw_examples(seeds, accepted, seed=1, number=n) for n in range(50)]
    assert all(len(set(examples)) == 4 and examples[-1] == accepted[0] for examples in drawn)
    assert {seed for examples in drawn for seed in examples} == {*seeds, *accepted}


def test_a_request_takes_braces_in_a_text_as_they_are() -> None:
    request = make_request("To {language}: {text}", language="French", text="print {language} {text}")
    assert request["prompt"] == "To French: print {language} {text}"


def test_the_prompt_of_a_chat_is_the_users_turn_before_its_first_answer() -> None:
    roles = ("system", "user", "user", "assistant", "user", "assistant")
    chat = {"messages": [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]}
    assert read_prompt(chat) == Prompt("system 0", "user 2")
    assert [turn["content"] for turn in replace_prompt(chat, "new")["messages"]][:4] == [
        *("system 0", "user 1", "new", "assistant 3")
    ]


def test_similarity_is_the_longest_common_subsequence_of_words_or_ideographs() -> None:
    pool = PromptPool(["the cat sat", "画一只猫"])
    assert pool.find_similarity("The CAT ran!") == pytest.approx(2 * 2 / 6)
    assert pool.find_similarity("画一只狗") == pytest.approx(2 * 3 / 8)
    assert pool.find_similarity("sat cat the") == 0  # a subsequence of one word is below the least
    assert pool.find_similarity("something else") == 0
    pool.add("?!")
    assert (pool.find_similarity("?!"), pool.find_similarity("!?")) == (1, 0)


def test_a_language_is_named_by_its_code_or_as_it_is() -> None:
    assert [get_language_name(name) for name in ("zh", "FR", "Old Norse")] == ["Chinese", "French", "Old Norse"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_instruct": -1}, "--self-instruct is -1"),
        ({"translate": True}, "--translate and --languages go together"),
        ({"languages": "en:1"}, "--translate and --languages go together"),
        ({"translate": True, "languages": "en:0.5,en:0.5"}, "is not LANGUAGE:SHARE"),
        ({"translate": True, "languages": "en:0,fr:1"}, "is not LANGUAGE:SHARE"),
        ({"translate": True, "languages": "en,fr"}, "is not LANGUAGE:SHARE"),
        ({"translate": True, "languages": "en:nan"}, "is not LANGUAGE:SHARE"),
        ({"translate_prompt": "Translate {text}"}, "--translate-prompt lacks {language}"),
        ({"instruct_prompt": "Go on"}, "--instruct-prompt lacks {examples}"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(
    config: GenerateDatasetConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        replace(config, **change)
