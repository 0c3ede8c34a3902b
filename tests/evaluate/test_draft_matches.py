"""What one pass over a target's own text says of a draft: exactly the passes that decoding with it takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.decode.drafters.targets import make_draft, make_target, target_tokenizer
from tests.stages.world import pairs, text
from transformers import PreTrainedModel

from potstill.core.errors import DataError
from potstill.core.types import IGNORE
from potstill.data.corpus import load_corpus
from potstill.decode.draft_length import FixedLength
from potstill.decode.drafters.drafter import Drafter
from potstill.decode.drafters.medusa import MedusaDrafter, MedusaHeads
from potstill.decode.drafters.model_drafter import ModelDrafter
from potstill.decode.engine import Engine
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.decode.speculative import Speculation
from potstill.evaluate.draft_matches import DraftMatches, match_heads, match_model
from potstill.evaluate.scoring_windows import Row, ScoringConfig
from potstill.evaluate.target_text import OPENING_TOKENS, list_prompts, write_target_rows
from potstill.models.load import LoadedModel
from potstill.models.signals import get_head

__all__ = ["pairs", "text"]

PROMPTS = [[5, 9, 30, 41], [7, 7, 7], [60, 3, 99, 12, 8, 44, 21]]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return LoadedModel(make_target("llama"), target_tokenizer(), "target", Path("target"), None, "")


@pytest.fixture(scope="module")
def rows(target: LoadedModel) -> list[Row]:
    return write_target_rows(target, PROMPTS, max_new_tokens=NEW_TOKENS)


def config_of(target: LoadedModel) -> ScoringConfig:
    return ScoringConfig(context=512, vocabulary=target.vocabulary, batch_tokens=40, chunk=8)


def count_engine_passes(target: LoadedModel, drafter: Drafter, length: int) -> int:
    """The passes of the engine over all prompts, one text at a time."""
    runner = ModelRunner(target.model, vocabulary=target.vocabulary, slots=1)
    engine = Engine(runner, speculation=Speculation(drafter=drafter, length=FixedLength(length)))
    stop = frozenset({target.tokenizer.eos_token_id})
    sampling = Sampling(vocabulary=target.vocabulary, stop=stop, temperature=0.0)
    for prompt in PROMPTS:
        engine.add(DecodeRequest(prompt=prompt, max_new_tokens=NEW_TOKENS, sampling=sampling))
    engine.run()
    return engine.stats.steps


def count_matched_passes(matches: DraftMatches, length: int) -> int:
    return round(sum(len(text) for text in matches.texts) / matches.mean_tokens(length))


@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_draft_models_passes_are_those_of_decoding(target: LoadedModel, rows: list[Row], length: int) -> None:
    draft = make_draft(target.model, noise=0.02)
    matches = match_model(draft, rows, config_of(target), longest=5)
    runner = ModelRunner(draft, vocabulary=target.vocabulary)
    passes = count_engine_passes(target, ModelDrafter(runner, widths=(1,) * length), length)
    assert count_matched_passes(matches, length) == passes
    assert 0.1 < matches.shares[0] < 0.98


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_passes_of_heads_are_those_of_decoding(target: LoadedModel, rows: list[Row], length: int) -> None:
    heads = make_heads(target.model, rows)
    matches = match_heads(heads, target.model, rows, config_of(target))
    drafter = MedusaDrafter(heads, get_head(target.model), widths=(1,) * length)
    assert count_matched_passes(matches, length) == count_engine_passes(target, drafter, length)
    assert matches.shares[0] > 0.1


def make_heads(model: PreTrainedModel, rows: list[Row]) -> MedusaHeads:
    """Heads that learned some of the text."""
    heads, head = MedusaHeads(model.config.hidden_size, 3), get_head(model)
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-2)
    ids = torch.tensor(rows[0].input_ids)
    with torch.no_grad():
        hidden = model.model(ids[None]).last_hidden_state[0]
    for _ in range(30):
        logits = [head.logits(states) for states in heads(hidden)]
        losses = [torch.nn.functional.cross_entropy(logits[k][: len(ids) - 2 - k], ids[2 + k :]) for k in range(3)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return heads


def test_a_perfect_draft_is_always_kept(target: LoadedModel, rows: list[Row]) -> None:
    matches = match_model(target.model, rows, config_of(target), longest=4)
    assert matches.shares == [1.0] * 4
    assert matches.mean_tokens(0) == 1.0
    acceptance, tokens = matches.measure(4)
    assert (acceptance.name, acceptance.value) == ("acceptance", 1.0)
    assert tokens.value == matches.mean_tokens(4) > 4


def test_rows_are_the_prompt_and_the_targets_greedy_answer(target: LoadedModel, rows: list[Row]) -> None:
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row.input_ids[: len(prompt)] == prompt
        assert [label != IGNORE for label in row.labels] == [i >= len(prompt) for i in range(len(row.labels))]
        with torch.no_grad():
            logits = target.model(torch.tensor([row.input_ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == row.input_ids[len(prompt) :]


def test_prompts_of_a_text_are_its_first_tokens_and_long_prompts_are_left_out(
    target: LoadedModel, text: Path, pairs: Path
) -> None:
    openings = list_prompts(load_corpus(str(text)), target, limit=5, max_new_tokens=8)
    assert [len(ids) for ids in openings] == [OPENING_TOKENS] * 5
    questions = list_prompts(load_corpus(str(pairs)), target, limit=3, max_new_tokens=8)
    assert "What is" in target.tokenizer.decode(questions[0])
    with pytest.raises(DataError, match="no prompt of at most 2 tokens"):
        list_prompts(load_corpus(str(pairs)), target, limit=3, max_new_tokens=510)


def test_an_answer_of_one_token_leaves_nothing_to_draft(target: LoadedModel) -> None:
    with pytest.raises(DataError, match="ends every answer at its first token"):
        write_target_rows(replace(target), PROMPTS, max_new_tokens=1)
