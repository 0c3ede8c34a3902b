"""Both sides of a preference in tokens: whole chats whose last answers are trained on, and one prompt for both."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import CHATML, SPECIALS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError
from potstill.core.types import BASELINE, CHOSEN, IGNORE, REJECTED
from potstill.data.corpus import Corpus
from potstill.data.pack_fields import GROUPS, OFFSETS, SIDES
from potstill.data.packing import collate, pack
from potstill.data.preference_tokens import TOO_LONG, TokenizedPreferences, tokenize_preferences
from potstill.data.preferences import load_preferences
from potstill.data.token_dataset import TokenizedDocument
from potstill.data.tokenize import Rendering
from potstill.models.spec import read_model_spec

Lines = Callable[..., Path]
Load = Callable[..., Corpus]
SYSTEM = {"role": "system", "content": "Be brief."}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture
def load(lines: Lines) -> Load:
    """A corpus of these rows, all of them."""

    def load_rows(*rows: Mapping[str, Any]) -> Corpus:
        return load_preferences(str(lines(rows)), split="all")

    return load_rows


def documents(tokenized: TokenizedPreferences) -> list[TokenizedDocument]:
    return list(tokenized.tokens)


def sides(rows: Iterable[TokenizedDocument]) -> list[int]:
    return [int(row.fields[SIDES.name]) for row in rows]


def trained(row: TokenizedDocument, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORE]))


def join(prompt: TokenizedDocument, side: TokenizedDocument) -> list[int]:
    """The whole chat of a side: what it sees of its prompt, and its own tokens."""
    return [*prompt.input_ids[: side.fields[OFFSETS.name]], *side.input_ids]


def test_the_prompt_and_a_continuation_are_the_whole_chat(load: Load, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [SYSTEM, user("Hi"), assistant("Hello."), user("Sum 1 2")]
    corpus = load({"prompt": prompt, "chosen": [assistant("3")], "rejected": [assistant("four")]})
    shared, chosen, rejected = documents(tokenize_preferences(corpus, tiny_tokenizer))
    for side, answer in ((chosen, "3"), (rejected, "four")):
        whole = tiny_tokenizer.apply_chat_template([*prompt, assistant(answer)], return_dict=False)
        assert join(shared, side) == whole
        assert trained(side, tiny_tokenizer) == f"{answer}<|im_end|>"
        assert side.input_ids[0] == tiny_tokenizer.encode("\n")[0]
    assert sides([shared, chosen, rejected]) == [-1, CHOSEN, REJECTED]
    assert set(shared.labels) == {IGNORE}
    assert "Be brief." in tiny_tokenizer.decode(shared.input_ids)


def test_the_first_token_and_the_end_token_of_an_answer_are_trained(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = load({"prompt": "Hi", "chosen": "abc", "rejected": "abd"})
    _, *answers = documents(tokenize_preferences(corpus, tiny_tokenizer))
    for row in answers:
        assert [label != IGNORE for label in row.labels] == [False, True, True, True, True, False]
        assert row.labels[4] == tiny_tokenizer.eos_token_id
    assert {row.fields[OFFSETS.name] for row in answers} == {len("suser\nHie\nsassistant")}


def test_a_tokenizer_without_a_template_writes_lines_and_ends_them(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template = None
    turns = [user("Hi"), assistant("Hello."), user("Sum")]
    corpus = load({"prompt": turns, "chosen": [assistant("3")], "rejected": [assistant("4")]})
    shared, chosen, rejected = documents(tokenize_preferences(corpus, tiny_tokenizer))
    assert tiny_tokenizer.decode(join(shared, chosen)) == "Hi\nHello.\nSum\n3<|im_end|>"
    assert [trained(row, tiny_tokenizer) for row in (chosen, rejected)] == ["3<|im_end|>", "4<|im_end|>"]


def merge_line_breaks() -> PreTrainedTokenizerFast:
    """Bytes as tokens, but a line break and an `A` after it are one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *letters, "ĊA"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "A")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def test_a_token_merged_across_the_border_of_the_prompt_ends_the_prompt_before_it(load: Load) -> None:
    tokenizer = merge_line_breaks()
    corpus = load({"prompt": "Hi", "chosen": "Aha", "rejected": "Oh"})
    shared, chosen, rejected = documents(tokenize_preferences(corpus, tokenizer))
    assert tokenizer.decode(shared.input_ids).endswith("assistan")
    assert tokenizer.convert_ids_to_tokens(chosen.input_ids) == ["t", "ĊA", "h", "a", "<|im_end|>", "Ċ"]
    assert tokenizer.convert_ids_to_tokens(rejected.input_ids) == ["t", "Ċ", "O", "h", "<|im_end|>", "Ċ"]
    assert [trained(row, tokenizer) for row in (chosen, rejected)] == ["ha<|im_end|>", "Oh<|im_end|>"]
    both = load({"prompt": "Hi", "chosen": "Aha", "rejected": "Ahem"})
    _, chosen, rejected = documents(tokenize_preferences(both, tokenizer))
    assert [trained(row, tokenizer) for row in (chosen, rejected)] == ["ha<|im_end|>", "hem<|im_end|>"]


def test_the_padding_side_changes_nothing(load: Load, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = load(
        {"prompt": "Hi", "chosen": "a", "rejected": "bcd"}, {"prompt": "Sum 1 2", "chosen": "3", "rejected": "4"}
    )
    tiny_tokenizer.padding_side, tiny_tokenizer.truncation_side = "left", "left"
    left = documents(tokenize_preferences(corpus, tiny_tokenizer))
    tiny_tokenizer.padding_side, tiny_tokenizer.truncation_side = "right", "right"
    assert documents(tokenize_preferences(corpus, tiny_tokenizer)) == left


def test_a_pair_longer_than_the_context_is_left_out_and_no_answer_is_cut(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.model_max_length = 16
    rows = [{"prompt": "Hi", "chosen": "a" * n, "rejected": "b" * 5} for n in (5, 30, 80)]
    corpus = load(*rows)
    whole = tokenize_preferences(corpus, tiny_tokenizer)
    size = len("suser\nHie\nsassistant") + len("\n" + "a" * 30 + "e\n") + len("\n" + "b" * 5 + "e\n")
    fitting = tokenize_preferences(corpus, tiny_tokenizer, length=size)
    assert (whole.counts.groups, fitting.counts.groups) == (3, 2)
    assert fitting.counts.left_out == {TOO_LONG: 1}
    assert fitting.counts.covering == size + 50
    packs = pack(fitting.tokens, length=size)
    assert packs.counts.to_dict() == {"documents": 6}
    answers = [trained(row, tiny_tokenizer) for row in fitting.tokens if row.fields[SIDES.name] == CHOSEN]
    assert sorted(map(len, answers)) == [5 + len("<|im_end|>"), 30 + len("<|im_end|>")]
    with pytest.raises(DataError, match=r"3 with more tokens than the context; --context \d+ holds 99 % of them"):
        tokenize_preferences(corpus, tiny_tokenizer, length=20)


def test_multi_turn_chats_whose_last_turns_differ_train_the_last_answers_alone(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [user("Hi"), assistant("Hello."), user("Why?"), assistant("So."), user("Hm?")]
    corpus = load({"chosen": [*turns, assistant("Yes.")], "rejected": [*turns, assistant("No.")]})
    shared, chosen, rejected = documents(tokenize_preferences(corpus, tiny_tokenizer))
    assert tiny_tokenizer.decode(shared.input_ids).count("assistant") == 3
    assert [trained(row, tiny_tokenizer) for row in (chosen, rejected)] == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_sides_of_different_numbers_of_turns_train_their_last_answers_alone(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    longer = [user("Hi"), assistant("Hello."), user("Why?"), assistant("So.")]
    corpus = load({"chosen": longer, "rejected": [user("Hi"), assistant("No.")]})
    shared, chosen, rejected = documents(tokenize_preferences(corpus, tiny_tokenizer))
    assert [trained(row, tiny_tokenizer) for row in (chosen, rejected)] == ["So.<|im_end|>", "No.<|im_end|>"]
    assert tiny_tokenizer.decode(join(shared, chosen)).count("assistant") == 2
    assert tiny_tokenizer.decode(chosen.input_ids).startswith("\nHello.<|im_end|>\n<|im_start|>user\nWhy?")


def test_without_sharing_each_side_repeats_its_prompt(load: Load, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = load({"prompt": "Hi", "chosen": "abc", "rejected": "d"})
    shared, *continuations = documents(tokenize_preferences(corpus, tiny_tokenizer))
    whole = documents(tokenize_preferences(corpus, tiny_tokenizer, shared=False))
    assert [row.input_ids for row in whole] == [join(shared, side) for side in continuations]
    assert [trained(row, tiny_tokenizer) for row in whole] == ["abc<|im_end|>", "d<|im_end|>"]
    assert [row.fields[OFFSETS.name] for row in whole] == [0, 0]


def test_equal_sides_and_answers_that_a_template_trims_are_left_out(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template = CHATML.replace("message['content'] +", "message['content'] | trim +")
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": text} for text in ("a", " a", "b", " ")]
    tokenized = tokenize_preferences(load(*rows), tiny_tokenizer)
    assert (tokenized.counts.groups, tokenized.counts.left_out) == (1, {"equal sides": 2, "an empty answer": 1})
    with pytest.raises(DataError, match=r"no preference of .* can be trained on, 1 with equal sides"):
        tokenize_preferences(load(rows[1]), tiny_tokenizer)


def test_counts_say_how_long_the_sides_are_and_which_is_shorter(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = [("a", "bbb"), ("aa", "bb"), ("aaa", "b"), ("aaaa", "b")]
    corpus = load(*({"prompt": "Hi", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs))
    counts = tokenize_preferences(corpus, tiny_tokenizer).counts
    assert (counts.chosen_tokens, counts.rejected_tokens) == (2.5 + 1, 1.75 + 1)
    assert counts.shorter_is_chosen == pytest.approx(1 / 3)
    assert json.loads(json.dumps(counts.to_dict()))["chosen"] == counts.chosen == counts.rejected == 4


def test_the_groups_of_a_pack_are_pairs_of_a_batch(load: Load, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = load(*({"prompt": f"Say {i}", "chosen": "a" * i, "rejected": "b"} for i in range(2, 8)))
    packs = pack(tokenize_preferences(corpus, tiny_tokenizer, length=100).tokens, length=100)
    batch = collate([packs[i] for i in range(len(packs))])
    chosen, rejected = batch["pairs"]
    assert batch["pairs"].shape == (2, 6)
    assert batch[GROUPS.name][chosen].tolist() == batch[GROUPS.name][rejected].tolist()
    assert set(batch[SIDES.name][chosen].tolist()) == {CHOSEN}


LABELED = [{"prompt": f"Say {i}", "completion": f"It is {i}.", "label": i % 2 == 0} for i in range(5)]


def test_kto_compares_each_answer_with_that_to_another_prompt_and_never_with_itself(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = load(*LABELED)
    rows = documents(tokenize_preferences(corpus, tiny_tokenizer, data="labels"))
    assert sides(rows) == [
        side for document in corpus.documents for side in (-1, 0 if document["label"] else 1, BASELINE)
    ]
    numbers = []
    for shared, own, baseline in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        question = tiny_tokenizer.decode(join(shared, own)).split("Say ")[1][0]
        texts = [trained(row, tiny_tokenizer) for row in (own, baseline)]
        assert texts[0] == f"It is {question}.<|im_end|>"
        assert texts[1] != texts[0]
        assert tiny_tokenizer.decode(join(shared, baseline)).split("Say ")[1][0] == question
        numbers.append((question, texts[1].split()[-1][0]))
    questions = [question for question, _ in numbers]
    assert [other for _, other in numbers] == [*questions[1:], questions[0]]


def test_kto_takes_both_sides_of_a_pair_and_its_baseline_from_another_prompt(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = load(*({"prompt": f"Say {i}", "chosen": f"{i} yes", "rejected": f"{i} no"} for i in range(3)))
    rows = documents(tokenize_preferences(corpus, tiny_tokenizer, data="labels"))
    assert sorted(sides(rows)) == [-1] * 6 + [CHOSEN] * 3 + [REJECTED] * 3 + [BASELINE] * 6
    for own, baseline in zip(rows[1::3], rows[2::3], strict=True):
        assert trained(own, tiny_tokenizer)[0] != trained(baseline, tiny_tokenizer)[0]
    assert collate([pack(rows, length=1000)[0]])["pairs"].shape == (2, 0)


def test_four_answers_and_their_baselines_are_a_group_if_half_a_pack_holds_them(
    load: Load, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    corpus = load(*LABELED)
    whole = tokenize_preferences(corpus, tiny_tokenizer, data="labels")
    assert whole.tokens.fields[GROUPS.name].tolist() == [0] * 12 + [1] * 3
    size = sum(len(row.input_ids) for row in list(whole.tokens)[:3])
    for length, numbers in ((4 * size, [0, 0, 1, 1, 2]), (3 * size, [0, 1, 2, 3, 4])):
        tokens = tokenize_preferences(corpus, tiny_tokenizer, data="labels", length=length).tokens
        assert tokens.fields[GROUPS.name][1::3].tolist() == numbers
    assert whole.counts.groups == 5


def test_kto_skips_an_answer_of_the_same_words(load: Load, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"Say {i}", "completion": "yes" if i else "no", "label": True} for i in range(4)]
    tokenized = documents(tokenize_preferences(load(*rows), tiny_tokenizer, data="labels"))
    for own, baseline in zip(tokenized[1::3], tokenized[2::3], strict=True):
        assert trained(own, tiny_tokenizer) != trained(baseline, tiny_tokenizer)


@pytest.mark.parametrize("number", [1, 2])
def test_kto_with_one_prompt_is_refused(load: Load, tiny_tokenizer: PreTrainedTokenizerFast, number: int) -> None:
    rows = [{"prompt": "Hi", "completion": f"Hello {i}.", "label": bool(i)} for i in range(number)]
    with pytest.raises(DataError, match=rf"among the {number} answers of .* one has none; give rows of more prompts"):
        tokenize_preferences(load(*rows), tiny_tokenizer, data="labels")


def test_answers_with_labels_are_no_pairs(load: Load, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="holds answers with labels and no pairs; train on them with --objective kto"):
        tokenize_preferences(load(*LABELED), tiny_tokenizer)


def test_control_tokens_in_an_answer_are_escaped(load: Load, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = load({"prompt": "Hi", "chosen": "a<|im_end|>b", "rejected": "c"})
    tokenized = tokenize_preferences(corpus, tiny_tokenizer, rendering=Rendering(special_in_text="escape"))
    _, chosen, _ = documents(tokenized)
    assert chosen.input_ids.count(tiny_tokenizer.eos_token_id) == 1
    assert tokenized.tokens.report.num_control_tokens == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "pairs"),
    [
        ("anthropics__hh-rlhf/harmless-base/test.jsonl.gz", 2308),
        ("hiyouga__LLaMA-Factory/data/dpo_en_demo.json.gz", 300),
        ("hiyouga__LLaMA-Factory/data/dpo_zh_demo.json.gz", 300),
    ],
)
def test_real_pairs_are_whole_chats_of_a_real_tokenizer(potstill_data: Path, path: str, pairs: int) -> None:
    tokenizer = read_model_spec("smollm2").tokenizer
    corpus = load_preferences(str(potstill_data / "instruct" / path), split="all")
    tokenized = tokenize_preferences(corpus, tokenizer)
    assert tokenized.counts.groups == pairs
    rows = documents(tokenize_preferences(corpus, tokenizer, limit=60))
    whole = documents(tokenize_preferences(corpus, tokenizer, limit=60, shared=False))
    groups = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    assert [join(shared, side) for shared, *answers in groups for side in answers] == [row.input_ids for row in whole]
    for number, (_, chosen, rejected) in enumerate(groups):
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            answer = corpus.documents[number][name][-1]["content"]
            assert trained(side, tokenizer) == f"{answer}<|im_end|>"


@pytest.mark.slow
def test_real_answers_with_labels_have_baselines(potstill_data: Path) -> None:
    tokenizer = read_model_spec("smollm2").tokenizer
    path = potstill_data / "instruct/hiyouga__LLaMA-Factory/data/kto_en_demo.json.gz"
    counts = tokenize_preferences(load_preferences(str(path), split="all"), tokenizer, data="labels").counts
    assert (counts.groups, counts.chosen + counts.rejected) == (300, 300)
