"""A runner gives the logits of the model itself, whatever was read, kept and dropped before, for every family."""

import math

import pytest
import torch
from tests.decode.families import ATTENTION, HYBRIDS, ROWS, make_model
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.decode.runner import ModelRunner
from potstill.decode.slot_reader import SlotReader

VOCABULARY = 97


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def whole_text_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The definition: the logits after a text that is read from its first token, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


@pytest.mark.parametrize("family", [*ATTENTION, "potstill"])
def test_trees_of_ragged_texts_have_the_logits_of_their_paths(family: str) -> None:
    model = make_model(family)
    runner = ModelRunner(model, vocabulary=VOCABULARY, slots=3)
    assert runner.takes_trees
    texts = {slot: random_ids(length, slot) for slot, length in ((0, 13), (2, 5), (1, 9))}
    for slot, ids in texts.items():
        runner.prefill(slot, ids)
    parents = torch.tensor([[-1, 0, 0, 2, 1], [-1, -1, 1, 1, 3], [-1, 0, 1, 2, 3]])
    paths = [[[0], [0, 1], [0, 2], [0, 2, 3], [0, 1, 4]], [[0], [1], [1, 2], [1, 3], [1, 3, 4]], [[0], [0, 1]]]
    tokens = torch.tensor([random_ids(5, 10 + row) for row in range(3)])
    logits = runner.forward([0, 1, 2], tokens, parents).logits
    for row, row_paths in enumerate(paths):
        for path in row_paths:
            expected = whole_text_logits(model, texts[row] + tokens[row, path].tolist())
            torch.testing.assert_close(logits[row, path[-1]], expected, rtol=1e-3, atol=1e-3)
    for row, path in enumerate(([0, 2, 3], [1, 3, 4], [0, 1])):
        runner.commit(row, path)
        texts[row] += tokens[row, path].tolist()
    next_tokens = torch.tensor([[7], [8], [9]])
    after = runner.forward([0, 1, 2], next_tokens).logits[:, 0]
    for row in range(3):
        expected = whole_text_logits(model, [*texts[row], int(next_tokens[row])])
        torch.testing.assert_close(after[row], expected, rtol=1e-3, atol=1e-3)
        assert runner.get_length(row) == len(texts[row])


@pytest.mark.parametrize("family", list(HYBRIDS))
def test_chains_of_ragged_texts_over_recurrences_are_kept_in_part(family: str) -> None:
    model = make_model(family)
    runner = ModelRunner(model, vocabulary=VOCABULARY, slots=3)
    assert type(runner.reader) is SlotReader
    assert runner.takes_drafts
    assert not runner.takes_trees
    texts = {slot: random_ids(length, slot) for slot, length in ((0, 13), (2, 5), (1, 9))}
    for slot, ids in texts.items():
        runner.prefill(slot, ids)
    for count, width in enumerate((5, 4)):  # the first tokens of one row, all of another, none of a third
        tokens = torch.tensor([random_ids(width, 10 * count + row) for row in range(3)])
        runner.forward([2, 0], tokens.flip(0)[:2])  # a draft that is never committed
        logits = runner.forward([0, 1, 2], tokens).logits
        runner.forward([1], tokens[:1, :2])  # a later pass over another text alone
        logits[1] = runner.forward([1], tokens[1:2]).logits[0]
        for row, kept in enumerate((3, width, 1 - count)):
            for t in range(width):
                expected = whole_text_logits(model, texts[row] + tokens[row, : t + 1].tolist())
                torch.testing.assert_close(logits[row, t], expected, rtol=1e-3, atol=1e-3)
            runner.commit(row, list(range(kept)))
            texts[row] += tokens[row, :kept].tolist()
            assert runner.get_length(row) == len(texts[row])
    with pytest.raises(UnsupportedModel, match="no tree of drafts"):
        runner.forward([0], torch.tensor([[5, 6, 7]]), torch.tensor([[-1, 0, 0]]))


@pytest.mark.parametrize("family", list(HYBRIDS))
def test_a_text_over_recurrences_is_kept_whole_or_not_at_all(family: str) -> None:
    model, ids = make_model(family), random_ids(9, 4)
    runner = ModelRunner(model, vocabulary=VOCABULARY, slots=2)
    for slot in (0, 1):
        runner.prefill(slot, ids)
    assert runner.rewind(0, 9) == 9
    expected = whole_text_logits(model, [*ids, 8])
    torch.testing.assert_close(runner.prefill(0, [8]).logits, expected, rtol=1e-3, atol=1e-3)
    assert runner.rewind(1, 5) == 0
    torch.testing.assert_close(runner.prefill(1, [*ids, 8]).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [*ATTENTION, *HYBRIDS, "potstill"])
def test_a_slot_that_is_free_takes_another_text(family: str) -> None:
    model = make_model(family)
    runner = ModelRunner(model, vocabulary=VOCABULARY, slots=3)
    texts = {slot: random_ids(12 - 3 * slot, slot) for slot in range(3)}
    for slot, ids in texts.items():
        runner.prefill(slot, ids)
    for layer in runner.reader.cache.layers:  # what is left of a text must not reach the next one
        for buffer in layer.buffers:
            buffer[0].fill_(torch.nan)
    runner.free(0)  # another text moves into its row
    texts[0] = random_ids(11, 20)
    runner.prefill(0, texts[0])
    for slots in ([0, 1, 2], [2, 0], [1]):
        logits = runner.forward(slots, torch.full((len(slots), 1), 5)).logits[:, 0]
        for slot, row in zip(slots, logits, strict=True):
            torch.testing.assert_close(row, whole_text_logits(model, [*texts[slot], 5]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["gemma3_text", "deltanet"])
def test_a_long_prompt_in_chunks_and_buffers_that_double_change_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    monkeypatch.setattr("potstill.decode.slots.INITIAL_CAPACITY", 8)
    runner, ids = ModelRunner(model, vocabulary=VOCABULARY, slots=2), random_ids(50, 3)
    runner.reader.chunk_size = 7
    runner.prefill(1, ids[:3])
    output = runner.prefill(0, ids)
    torch.testing.assert_close(output.logits, whole_text_logits(model, ids), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].float()
    torch.testing.assert_close(runner.compute_logits(output.features), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", list(ROWS))
def test_a_model_that_reads_one_text_at_a_time_decodes_plainly_and_refuses_trees(family: str) -> None:
    model = make_model(family)
    runner = ModelRunner(model, vocabulary=VOCABULARY, slots=2)
    assert not runner.takes_trees
    texts = [random_ids(13, 1), random_ids(6, 2)]
    for slot, ids in enumerate(texts):
        runner.prefill(slot, ids)
    for step in range(4):
        tokens = torch.tensor([[20 + step], [40 + step]])
        logits = runner.forward([0, 1], tokens).logits[:, 0]
        for slot in range(2):
            texts[slot].append(int(tokens[slot]))
            runner.commit(slot, [0])
            torch.testing.assert_close(logits[slot], whole_text_logits(model, texts[slot]), rtol=1e-3, atol=1e-3)
    with pytest.raises(UnsupportedModel, match="no tree of drafts"):
        runner.forward([0], torch.tensor([[5, 6, 7]]), torch.tensor([[-1, 0, 0]]))


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_chain_is_taken_back_by_a_model_that_reads_one_text_at_a_time(family: str) -> None:
    model, ids = make_model(family), random_ids(9, 4)
    runner = ModelRunner(model, vocabulary=VOCABULARY)
    runner.prefill(0, ids)
    logits = runner.forward([0], torch.tensor([[5, 6, 7]])).logits[0]
    for n, row in enumerate(logits):
        torch.testing.assert_close(row, whole_text_logits(model, [*ids, *[5, 6, 7][: n + 1]]), rtol=1e-3, atol=1e-3)
    runner.commit(0, [0])
    after = runner.forward([0], torch.tensor([[8]])).logits[0, 0]
    torch.testing.assert_close(after, whole_text_logits(model, [*ids, 5, 8]), rtol=1e-3, atol=1e-3)


def test_a_recurrence_that_cannot_roll_back_refuses_a_draft() -> None:
    runner = ModelRunner(make_model("mamba"), vocabulary=VOCABULARY)
    runner.prefill(0, random_ids(5, 1))
    with pytest.raises(UnsupportedModel, match="cannot take back tokens"):
        runner.forward([0], torch.tensor([[5, 6]]))


@pytest.mark.parametrize("family", [*ATTENTION, *HYBRIDS, *ROWS, "potstill"])
def test_a_restricted_vocabulary_has_the_logits_of_its_tokens_and_no_others(family: str) -> None:
    model, ids, token_ids = make_model(family), random_ids(9, 4), torch.tensor([5, 96, 3, 40])
    logits = ModelRunner(model, vocabulary=VOCABULARY, token_ids=token_ids).prefill(0, ids).logits
    expected = torch.full((VOCABULARY,), -math.inf)
    expected[token_ids] = whole_text_logits(model, ids)[token_ids]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_a_text_beyond_the_context_is_refused() -> None:
    runner = ModelRunner(make_model("llama"), vocabulary=VOCABULARY, context=8)
    with pytest.raises(UsageError, match="9 tokens exceeds the 8 tokens of context"):
        runner.prefill(0, random_ids(9, 1))
