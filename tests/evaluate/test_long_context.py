"""Bits per byte by position equals its definition, and the needle probe tells finding from guessing."""

import math
import re

import pytest
import torch
from tests.data.trained import byte_level
from tests.tiny import random_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import DataError, UnsupportedModel, UsageError
from potstill.core.types import Batch, Needs, Signals
from potstill.evaluate.long_context import (
    VALUES,
    NeedleCell,
    NeedleConfig,
    cut_long_windows,
    make_edges,
    probe_needle,
    score_by_position,
    tokenize_needle,
)
from potstill.evaluate.perplexity import build_text_rows, score
from potstill.evaluate.scoring_windows import ScoringConfig

TEXT = "naïve 日本語 and the quick brown fox jumps over the lazy dog, again and again. " * 4


def test_ranges_are_halves_of_the_window() -> None:
    assert make_edges(4096) == (0, 128, 256, 512, 1024, 2048, 4096)
    assert make_edges(100) == (0, 50, 100)
    assert make_edges(40) == (0, 40)


def test_windows_are_cut_end_to_end_the_first_of_each_document_first() -> None:
    documents = [list(range(10, 20)), [1, 2, 3], list(range(30, 34))]
    assert cut_long_windows(documents, 4, limit=9) == [[10, 11, 12, 13], [30, 31, 32, 33], [14, 15, 16, 17]]
    assert cut_long_windows(documents, 4, limit=2, bos=10) == [[10, 11, 12, 13], [10, 1, 2, 3]]
    with pytest.raises(DataError, match="has 11 tokens; the longest has 10"):
        cut_long_windows(documents, 11, limit=9)


def test_bits_per_byte_of_a_range_is_the_sum_over_its_positions(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tiny_tokenizer(TEXT, add_special_tokens=False).input_ids
    windows = cut_long_windows([ids], 128, limit=2)
    scores = score_by_position(tiny_llama, tiny_tokenizer, windows, ScoringConfig(chunk=50))
    assert scores.edges == (0, 32, 64, 128)
    assert scores.num_bytes.tolist() == [[31, 32, 64]] * 2  # a token is a byte here, and the first is not scored
    for number, window in enumerate(windows):
        with torch.no_grad():
            logits = tiny_llama(torch.tensor([window])).logits[0, :-1]
        nll = -logits.log_softmax(-1).gather(1, torch.tensor(window[1:])[:, None])[:, 0].numpy()
        for column, (start, stop) in enumerate([(1, 32), (32, 64), (64, 128)]):
            assert scores.nll[number, column] == pytest.approx(nll[start - 1 : stop - 1].sum(), rel=1e-5)
    rows = scores.to_rows()
    assert rows[1]["bits_per_byte"] == pytest.approx(scores.nll[:, 1].sum() / math.log(2) / 64)
    assert rows[1]["low"] <= rows[1]["bits_per_byte"] <= rows[1]["high"]


def test_the_ranges_of_a_window_add_up_to_its_score() -> None:
    tokenizer = byte_level()
    model = random_llama(tokenizer, context=512)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    scores = score_by_position(model, tokenizer, [ids])
    (row,) = build_text_rows([TEXT], tokenizer)
    whole = score(model, [row])
    assert scores.nll.sum() == pytest.approx(whole.nll.sum(), rel=1e-5)
    assert scores.num_bytes.sum() == whole.num_bytes.sum()
    assert "low" not in scores.to_rows()[0]


class Reader(LlamaForCausalLM):
    """Names the last password that stands among the last `sight` tokens, of the name that is asked for."""

    sight = 10_000
    read: list[list[int]]

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        ids = batch["input_ids"][0].tolist()
        self.read.append(ids)
        text = self.tokenizer.decode(ids)
        name = text.rsplit("The password of ", 1)[1].split()[0]
        seen = self.tokenizer.decode(ids[-self.sight :])
        found = re.findall(rf"The password of {name} is (\w+)\.", seen)
        logits = torch.zeros(1, len(self.tokenizer))
        if found:
            _, _, candidates = tokenize_needle(self.tokenizer, name, found[-1])
            logits[0, candidates[VALUES.index(found[-1])]] = 1.0
        return Signals(rows=torch.zeros(1, 1), logits=lambda _: logits)


@pytest.fixture
def reader(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Reader:
    model = Reader(tiny_llama.config).eval()
    model.tokenizer, model.read = tiny_tokenizer, []
    return model


def filler(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(TEXT, add_special_tokens=False).input_ids


def accuracies(cells: tuple[NeedleCell, ...]) -> dict[tuple[int, float], float]:
    return {(cell.length, cell.depth): cell.to_dict()["accuracy"] for cell in cells}


def test_a_model_that_reads_everything_finds_every_needle(reader: Reader) -> None:
    cells = probe_needle(reader, reader.tokenizer, filler(reader.tokenizer), NeedleConfig(tokens=800, trials=3), bos=1)
    assert {cell.length for cell in cells} == {100, 200, 400, 800}
    assert set(accuracies(cells).values()) == {1.0}
    assert {len(ids) for ids in reader.read} == {100, 200, 400, 800}
    assert cells[0].to_dict() == {"length": 100, "depth": 0.0, "accuracy": 1.0, "n": 3}


def test_a_model_finds_what_lies_within_its_sight_and_guesses_the_rest(reader: Reader) -> None:
    reader.sight = 200
    config = NeedleConfig(tokens=800, trials=32, depths=(0.0, 0.5, 1.0))
    found = accuracies(probe_needle(reader, reader.tokenizer, filler(reader.tokenizer), config))
    assert {found[length, 1.0] for length in (200, 400, 800)} == {1.0}
    assert found[200, 0.0] == 1.0
    assert max(found[800, depth] for depth in (0.0, 0.5)) < 0.4  # one value of eight


def test_a_trial_has_the_same_tokens_at_every_depth(reader: Reader) -> None:
    config = NeedleConfig(tokens=160, trials=2)
    probe_needle(reader, reader.tokenizer, filler(reader.tokenizer), config)
    assert len(reader.read) == 10
    for trial in (reader.read[:5], reader.read[5:]):
        assert len({tuple(sorted(ids)) for ids in trial}) == 1
        assert len({tuple(ids) for ids in trial}) == 5


def test_the_question_ends_where_the_values_differ(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    needle, question, candidates = tokenize_needle(tiny_tokenizer, "Anna", "apple")
    assert tiny_tokenizer.decode(needle) == "\nThe password of Anna is apple.\n"
    assert tiny_tokenizer.decode(question) == "\nThe password of Anna is "
    assert [tiny_tokenizer.decode([i]) for i in candidates] == [word[0] for word in VALUES]


def test_what_cannot_be_probed_is_refused(reader: Reader, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="64 tokens is too short for a needle; give at least 95"):
        probe_needle(reader, tiny_tokenizer, filler(tiny_tokenizer), NeedleConfig(tokens=64))
    with pytest.raises(DataError, match="no text to hide a needle in"):
        probe_needle(reader, tiny_tokenizer, [], NeedleConfig(tokens=800))
    tiny_tokenizer.add_tokens([" apple"])  # now the spaces before the other values are one token
    with pytest.raises(UnsupportedModel, match="begins two words of the needle probe alike"):
        tokenize_needle(tiny_tokenizer, "Anna", "apple")
