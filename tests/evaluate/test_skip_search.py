"""The search for layers to skip: it finds those that do nothing, and predicts what decoding with them takes."""

from pathlib import Path

import pytest
import torch
from tests.decode.drafters.targets import target_tokenizer
from tests.decode.families import make_stock_model
from transformers import PreTrainedModel

from potstill.decode.drafters.layer_skip import list_skipped
from potstill.decode.runner import ModelRunner
from potstill.evaluate.draft_matches import DraftMatches, match_model, predict_rows
from potstill.evaluate.pass_times import PassCosts, time_passes
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.evaluate.skip_search import SkipCosts, SkipSearch, format_layers
from potstill.evaluate.target_text import write_target_rows
from potstill.models.layer_view import keep_layers
from potstill.models.load import LoadedModel
from potstill.models.signals import probe_model

LAYERS, LENGTHS = 7, range(1, 5)
IDLE = {1, 3, 4}  # layers that do nothing
COSTS = SkipCosts(num_layers=LAYERS, base=0.2, verify={length: 1 + 0.02 * length for length in LENGTHS})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    size = len(target_tokenizer())
    changes = {"vocab_size": size, "max_position_embeddings": 512, "num_hidden_layers": LAYERS}
    model = make_stock_model("llama", changes)
    with torch.no_grad():
        for layer in IDLE:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    return model


class Scorer:
    """The matches of the model without some layers, and how often they were measured."""

    def __init__(self, model: PreTrainedModel) -> None:
        loaded = LoadedModel(model, target_tokenizer(), "model", Path("model"), None, "")
        self.model, self.calls = model, 0
        self.config = ScoringConfig(context=512, vocabulary=loaded.vocabulary)
        self.rows = write_target_rows(loaded, [[5, 9, 30], [41, 60, 7, 7]], max_new_tokens=32)
        self.reference = predict_rows(model, self.rows, self.config)

    def __call__(self, skipped: frozenset[int]) -> DraftMatches:
        self.calls += 1
        draft = keep_layers(self.model, [layer for layer in range(LAYERS) if layer not in skipped])
        return match_model(draft, self.rows, self.config, longest=max(LENGTHS), reference=self.reference)


def test_the_search_finds_the_layers_that_do_nothing(model: PreTrainedModel) -> None:
    scorer = Scorer(model)
    search = SkipSearch(scorer, COSTS, max_evaluations=60)
    best = search.run()
    assert set(best.layers) == IDLE
    assert best.agreement == 1.0
    tokens, length = best.matches.mean_tokens(best.draft_length), best.draft_length
    assert best.costs.draft == pytest.approx(0.2 + 0.8 * 4 / 7)
    assert best.speed_up == pytest.approx(tokens / (length * best.costs.draft + 1 + 0.02 * length))
    every_layer_but_one = search.costs.count(LAYERS - 1).predict(scorer(frozenset(range(1, LAYERS))).mean_tokens(1), 1)
    assert best.speed_up == max(map(best.predict, LENGTHS)) > 1 > every_layer_but_one
    assert scorer.calls == len(search.sets) + 1  # no set is measured twice
    again = SkipSearch(scorer, COSTS, max_evaluations=60).run()
    assert again.layers == best.layers


@pytest.mark.parametrize("limit", [1, 4, 9])
def test_the_search_keeps_to_its_budget(model: PreTrainedModel, limit: int) -> None:
    search = SkipSearch(Scorer(model), COSTS, max_evaluations=limit)
    assert search.run() in search.sets.values()
    assert len(search.sets) <= limit


def test_where_no_set_pays_the_least_harmful_is_best(model: PreTrainedModel) -> None:
    dear = SkipCosts(num_layers=LAYERS, base=1.0, verify=dict.fromkeys(LENGTHS, 1.0))
    best = SkipSearch(Scorer(model), dear, max_evaluations=40).run()
    assert set(best.layers) <= IDLE
    assert best.speed_up <= 1.0


@pytest.mark.parametrize("text", ["0", "3,5-8", "1-2", "0,2,4,6-9,11"])
def test_layers_are_written_as_the_drafter_reads_them(text: str) -> None:
    layers = list_skipped(text, 20)
    assert format_layers(layers) == text


def test_a_view_has_the_facts_of_its_model(model: PreTrainedModel) -> None:
    facts = probe_model(model)
    assert probe_model(keep_layers(model, [0, 2])) is facts


def test_passes_over_more_tokens_are_timed_in_turns(model: PreTrainedModel) -> None:
    runner = ModelRunner(model, vocabulary=len(target_tokenizer()))
    seconds = time_passes(runner, [5, 6, 7], [1, 3], runs=2)
    assert set(seconds) == {1, 3}
    assert min(seconds.values()) > 0
    assert runner.get_length(0) == 0
    costs = PassCosts(draft=0.5, verify={2: 1.25})
    assert costs.predict(2.25, 2) == 1.0
