"""Preferences as messages and as batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, UsageError
from potstill.core.types import CHOSEN, REJECTED, supervised_positions
from potstill.data.corpus import HELD_OUT_DUPLICATE, load_corpus, remove_held_out
from potstill.data.preferences import batch_of, load_preferences, to_preference

Lines = Callable[..., Path]
PAIRS = [{"prompt": f"Say {i // 2}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(120)]


def test_a_batch_of_pairs_holds_each_prompt_once_and_both_answers_after_it() -> None:
    batch = batch_of([([1, 2, 3], [4, 5], [4, 6, 7]), ([8, 9], [10], [11])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 4, 6, 7, 8, 9, 10, 9, 11]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2, 1, 2]]
    assert batch["sides"].tolist() == [-1, CHOSEN, REJECTED, -1, CHOSEN, REJECTED]
    assert batch["groups"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["pairs"].tolist() == [[1, 4], [2, 5]]
    assert supervised_positions(batch)[1].tolist() == [4, 5, 4, 6, 7, 10, 11]


def test_a_batch_without_shared_prompts_repeats_them() -> None:
    batch = batch_of([([1, 2, 3], [4, 5], [6])], shared=False)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["sides"].tolist() == [CHOSEN, REJECTED]
    assert batch["pairs"].tolist() == [[0], [1]]
    assert supervised_positions(batch)[1].tolist() == [4, 5, 6]


def test_a_prompt_of_one_token_is_repeated() -> None:
    batch = batch_of([([1], [4, 5], [6])])
    assert batch["input_ids"].tolist() == [[1, 4, 5, 1, 6]]
    assert batch["offsets"].tolist() == [0, 0]
    assert supervised_positions(batch)[1].tolist() == [4, 5, 6]


@pytest.mark.parametrize("pairs", [[], [([], [1], [2])], [([1], [], [2])], [([1], [2], [])]])
def test_a_pair_without_tokens_is_refused(pairs: list[tuple[list[int], list[int], list[int]]]) -> None:
    with pytest.raises(UsageError, match="at least one"):
        batch_of(pairs)


def prompts_of(*rows: dict[str, Any], lines: Lines, split: str) -> list[str]:
    corpus = load_preferences(str(lines(rows)), split=split)
    return [str(to_preference(document).prompt[0]["content"]) for document in corpus.documents]


def test_no_prompt_stands_in_both_splits_and_no_pair_is_lost(lines: Lines) -> None:
    train, validation = (prompts_of(*PAIRS, lines=lines, split=split) for split in ("train", "validation"))
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 120
    assert 2 <= len(set(validation)) <= 12
    assert all(validation.count(prompt) == 2 for prompt in validation)


def test_at_least_two_prompts_are_held_out_so_that_kto_can_compare_them(lines: Lines) -> None:
    for count, held_out in ((2, 1), (3, 1), (4, 2), (9, 2)):
        rows = [{"prompt": f"Say {i}", "completion": "yes", "label": True} for i in range(count)]
        validation = prompts_of(*rows, lines=lines, split="validation")
        assert len(validation) >= held_out
        assert len(prompts_of(*rows, lines=lines, split="train")) == count - len(validation) >= held_out


def test_pairs_to_one_prompt_have_no_validation_share(lines: Lines) -> None:
    path = str(lines([{"prompt": "Hi", "chosen": f"{i}", "rejected": "no"} for i in range(3)]))
    with pytest.raises(DataError, match="holds no two different prompts, so none can be held out"):
        load_preferences(path, split="validation")


def test_pairs_whose_prompt_is_held_out_elsewhere_are_not_trained_on(lines: Lines) -> None:
    corpus = load_preferences(str(lines(PAIRS)), split="all")
    other = load_preferences(
        str(lines([{"prompt": " Say 3 ", "chosen": "a", "rejected": "b"}], name="other.jsonl")), split="all"
    )
    left = remove_held_out(corpus, other.documents)
    assert len(left) == 118
    assert left.drop_counts[HELD_OUT_DUPLICATE] == 2


def test_preferences_come_back_from_the_corpus_as_messages(lines: Lines) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "Sum"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "No."}], "tools": [{"name": "add"}]}
    (document,) = load_preferences(str(lines([row])), split="all").documents
    assert to_preference(document) == ([turns[0]], turns[1:], [{"role": "assistant", "content": "No."}], None)
    assert document["tools"] == '[{"name": "add"}]'


def test_pairs_and_answers_with_labels_mix_by_weight(lines: Lines) -> None:
    pairs = lines(PAIRS[:100], name="pairs.jsonl")
    labeled = lines([{"prompt": f"No {i}", "completion": "c", "label": i % 2} for i in range(100)], name="labels.jsonl")
    corpus = load_preferences([f"{pairs}:0.5", f"{labeled}:0.5"])
    assert corpus.kind == "preferences"
    labels = [document["label"] for document in corpus.documents]
    assert labels.count(None) > 10
    assert labels.count(True) > 10


def test_other_data_and_rows_that_teach_nothing_are_refused(lines: Lines) -> None:
    with pytest.raises(DataError, match="which hold no preferences; accepted are chosen with rejected"):
        load_preferences(str(lines([{"prompt": "a", "response": "b"}])))
    equal = [{"prompt": f"Say {i}", "chosen": "a", "rejected": "a"} for i in range(7)]
    with pytest.raises(DataError, match="holds nothing to train on: 7 with equal sides"):
        load_preferences(str(lines(equal)))


def test_a_row_of_another_shape_is_refused_or_left_out(lines: Lines) -> None:
    path = str(lines([*PAIRS[:40], {"prompt": "Hi", "chosen": 3, "rejected": "b"}]))
    with pytest.raises(DataError, match="line 41 has int in `content`"):
        load_preferences(path)
    corpus = load_preferences(path, split="all", on_bad_row="skip")
    assert (len(corpus), len(corpus.bad_rows)) == (40, 1)


def test_text_is_never_trained_on_rejected_answers(lines: Lines) -> None:
    with pytest.raises(DataError, match=r"as preference data has, .* learn from preferences with potstill align"):
        load_corpus(str(lines(PAIRS)))
