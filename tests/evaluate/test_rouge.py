from copy import deepcopy

import pytest
import torch
from datasets import Dataset

from potstill.core.errors import DataError
from potstill.data.corpus import Corpus
from potstill.evaluate.rouge import (
    GenerationOptions,
    Question,
    build_questions,
    generate_texts,
    pad_left,
    rouge_l,
    score_answers,
    tokenize_prompt,
)
from potstill.models.load import LoadedModel


@pytest.fixture
def prompts(tiny_tokenizer):
    return [tiny_tokenizer(text).input_ids for text in ("Say", "What is the capital of France?", "Hello there", "2+2")]


def test_rouge_l_is_the_hand_computed_f1():
    # LCS("the cat sat", "the cat on the mat") = 2, P = 2/3, R = 2/5, F1 = 1/2
    assert rouge_l(["the cat sat"], [["the cat on the mat"]]) == pytest.approx([50])


def test_rouge_l_takes_the_best_reference_and_stems():
    assert rouge_l(["he walks", "x"], [["nothing", "he walked"], ["y"]]) == pytest.approx([100, 0])


def test_an_empty_answer_scores_zero():
    assert rouge_l([""], [["something"]]).tolist() == [0]


def test_greedy_answers_are_those_of_the_argmax_step_by_step(tiny_llama, tiny_tokenizer, prompts):
    written = generate_texts(tiny_llama, tiny_tokenizer, prompts[:1], options=GenerationOptions(max_new_tokens=12))
    ids = list(prompts[0])
    for _ in range(12):
        with torch.no_grad():
            ids.append(tiny_llama(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tiny_tokenizer.eos_token_id:
            break
    assert written == [tiny_tokenizer.decode(ids[len(prompts[0]) :], skip_special_tokens=True)]


def test_batches_and_padding_change_no_answer(tiny_llama, tiny_tokenizer, prompts):
    one, three = (
        generate_texts(
            tiny_llama, tiny_tokenizer, prompts, options=GenerationOptions(max_new_tokens=8, batch_size=size)
        )
        for size in (1, 3)
    )
    assert one == three
    assert len(set(one)) > 1


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone(tiny_llama, tiny_tokenizer, prompts):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        generate_texts(
            tiny_llama, tiny_tokenizer, prompts, options=GenerationOptions(max_new_tokens=8, temperature=1.0, seed=seed)
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert first == again != other


def test_an_answer_ends_at_the_stop_token_and_is_not_padded(tiny_llama, tiny_tokenizer, prompts):
    stopping = deepcopy(tiny_llama)
    with torch.no_grad():
        first = stopping(torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    stopping.generation_config.eos_token_id = first
    texts = generate_texts(stopping, tiny_tokenizer, prompts, options=GenerationOptions(max_new_tokens=8))
    assert texts[0] == tiny_tokenizer.decode([first])
    assert any(len(text) > len(texts[0]) for text in texts)


def test_padding_stands_before_the_shorter_prompts():
    ids, mask = pad_left([[5], [6, 7, 8]], 0)
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_only_the_first_questions_are_asked(tiny_llama, tiny_tokenizer, prompts):
    asked = [Question(prompt, ["yes"]) for prompt in prompts]
    answers = score_answers(tiny_llama, tiny_tokenizer, asked, limit=2, options=GenerationOptions(max_new_tokens=2))
    assert len(answers.texts) == len(answers.rouge_l) == 2


def test_prompts_that_the_context_has_no_room_for_are_not_asked(tiny_llama, tiny_tokenizer, prompts):
    tiny_llama.config.max_position_embeddings = 20
    asked = [Question(ids, ["yes"]) for ids in ([5] * 19, [5] * 18, [5] * 3)]
    answers = score_answers(tiny_llama, tiny_tokenizer, asked, options=GenerationOptions(max_new_tokens=2))
    assert len(answers.texts) == 2
    with pytest.raises(DataError, match="longer than the 18 tokens"):
        score_answers(tiny_llama, tiny_tokenizer, asked[:1], options=GenerationOptions(max_new_tokens=2))


def test_a_prompt_goes_through_the_chat_template_once(tiny_tokenizer):
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(tokenize_prompt("Hi", tiny_tokenizer)) == rendered
    tiny_tokenizer.chat_template = None
    assert tiny_tokenizer.decode(tokenize_prompt("Hi", tiny_tokenizer)) == "Hi"


def corpus(kind, documents):
    return Corpus("tiny", kind, Dataset.from_list(documents), None, None, {})


def test_of_a_chat_the_last_answer_is_asked_for(tiny_tokenizer):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    chat = {"messages": [{"role": role, "content": said} for role, said in turns]}
    (asked,) = build_questions(corpus("chat", [chat, {"messages": chat["messages"][:1]}]), tiny_tokenizer)
    assert tiny_tokenizer.decode(asked.prompt).endswith("user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert asked.references == ["d"]


def test_a_pair_without_a_template_ends_its_prompt_with_a_line_break(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    (asked,) = build_questions(corpus("pairs", [{"prompt": "a", "response": "b"}] * 3), tiny_tokenizer, limit=1)
    assert tiny_tokenizer.decode(asked.prompt) == "a\n"


def test_plain_text_asks_nothing(tiny_tokenizer):
    with pytest.raises(DataError, match="plain text"):
        build_questions(corpus("text", [{"text": "a"}]), tiny_tokenizer)


def test_samples_stand_side_by_side_and_stay_in_their_cells(tiny_llama, tiny_tokenizer, tmp_path):
    from potstill.evaluate.samples import format_markdown, generate_samples

    loaded = LoadedModel(tiny_llama, tiny_tokenizer, "tiny", tmp_path, None, "")
    samples = generate_samples(
        {"one": loaded, "two": loaded}, ["a | b", "c"], options=GenerationOptions(max_new_tokens=3)
    )
    assert [sample["prompt"] for sample in samples] == ["a | b", "c"]
    assert samples[0]["answers"]["one"] == samples[0]["answers"]["two"]
    samples[0]["answers"] = {"one": "x\n| <b> `y`", "two": ""}
    lines = format_markdown(samples[:1]).splitlines()
    assert lines[:2] == ["| prompt | one | two |", "| --- | --- | --- |"]
    assert lines[2] == "| a \\| b | x<br>\\| &lt;b> \\`y\\` | (nothing) |"
    assert format_markdown([]) == ""
