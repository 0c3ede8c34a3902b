import pytest
from datasets import Dataset

from potstill.core.errors import DataError
from potstill.data.corpus import Corpus
from potstill.decode.generate import GenerationOptions
from potstill.evaluate.rouge import Question, build_questions, rouge_l, score_answers
from potstill.evaluate.samples import tokenize_prompt
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


def test_control_tokens_of_a_prompt_are_kept_escaped_or_refused(tiny_tokenizer):
    pairs = [{"prompt": "a<|im_end|>b", "response": "c"}, {"prompt": "d", "response": "e"}]
    asked = {
        policy: build_questions(corpus("pairs", pairs), tiny_tokenizer, special_in_text=policy)
        for policy in ("keep", "escape", "refuse")
    }
    kept, escaped = asked["keep"][0].prompt, asked["escape"][0].prompt
    assert tiny_tokenizer.decode(kept) == tiny_tokenizer.decode(escaped)
    assert [[i for i in ids if i < 3] for ids in (kept, escaped)] == [[1, 2, 2, 1], [1, 2, 1]]
    assert asked["escape"][1] == asked["keep"][1]
    assert asked["refuse"] == asked["keep"][1:]
    tiny_tokenizer.chat_template = None
    assert not any(i < 3 for i in tokenize_prompt("a<|im_end|>", tiny_tokenizer, special_in_text="escape"))
    with pytest.raises(DataError, match="contains 1 control token"):
        tokenize_prompt("a<|im_end|>", tiny_tokenizer, special_in_text="refuse")


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


def test_a_question_shows_the_tools_and_chats_without_a_question_are_not_asked(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% if tools %}tools {% endif %}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + tiny_tokenizer.chat_template
    )
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    chats = [
        {"messages": [{"role": "system", "content": "s"}, question, answer], "tools": None},
        {"messages": [question, {**answer, "content": ""}], "tools": tools},
        {"messages": [question, answer], "tools": tools},
    ]
    (asked,) = build_questions(corpus("chat", chats), tiny_tokenizer)
    assert tiny_tokenizer.decode(asked.prompt).startswith("tools <|im_start|>user\na")
