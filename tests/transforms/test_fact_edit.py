"""An edit makes its targets likelier in every language, changes no weight, and stays within its clamp."""

from dataclasses import replace

import pytest
import torch
from tests.models.test_feed_forward import own_form
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from potstill.models.edits import PlacedEdit, apply_edits
from potstill.transforms import fact_edit
from potstill.transforms.fact_edit import EditText, FactEditConfig, LearnedEdit, clamp_norms, learn_edit, score_target

TEXTS = {  # the same subject (20, 21) in two languages: the answer follows token 6
    "en": EditText([4, 9, 20, 21, 5, 6, 50, 51, 2], 3, 6),
    "fr": EditText([4, 11, 12, 20, 21, 6, 60, 61, 62, 2], 4, 6),
}
NEUTRAL = [EditText([4, 20, 21, 6], 2, 4)]
NEURONS = {0: torch.arange(0, 40), 1: torch.arange(3, 40)}
NORMS = torch.tensor([2.0, 7.0, 6.0])
CONFIG = FactEditConfig(steps=12, learning_rate=0.5, clamp=3.0, neutral_weight=0.1)


def learn(model: LlamaForCausalLM, config: FactEditConfig = CONFIG) -> LearnedEdit:
    return learn_edit(model, TEXTS, NEUTRAL, NEURONS, NORMS, config)


def measure_nll(model: LlamaForCausalLM, text: EditText, learned: LearnedEdit | None) -> float:
    """-log P of a target by the definition, in one pass over the whole text."""
    placed = [] if learned is None else [PlacedEdit(text.position, learned.deltas)]
    with torch.no_grad(), apply_edits(model, [placed]):
        logits = model(torch.tensor([text.ids]), use_cache=False).logits[0]
    return float(cross_entropy(logits[text.start - 1 : -1], torch.tensor(text.ids[text.start :]), reduction="sum"))


@pytest.mark.parametrize("is_own", [False, True])
def test_targets_become_likelier_in_every_language(tiny_llama: LlamaForCausalLM, is_own: bool) -> None:
    model = own_form(tiny_llama) if is_own else tiny_llama
    learned = learn(model)
    for language, text in TEXTS.items():
        assert learned.after[language] < 0.95 * learned.before[language]
        assert learned.before[language] == pytest.approx(measure_nll(model, text, None), rel=1e-4)
        assert learned.after[language] == pytest.approx(measure_nll(model, text, learned), rel=1e-4)
    assert {layer: delta.neurons.tolist() for layer, delta in learned.deltas.items()} == {
        layer: ids.tolist() for layer, ids in NEURONS.items()
    }


def test_the_gradient_reaches_the_change_alone(tiny_llama: LlamaForCausalLM) -> None:
    before = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
    tiny_llama.train()
    learn(tiny_llama)
    assert tiny_llama.training
    assert all(weight.grad is None for weight in tiny_llama.parameters())
    for name, weight in tiny_llama.state_dict().items():
        assert torch.equal(weight, before[name])


def test_one_change_serves_all_languages_because_the_loss_is_their_sum(tiny_llama: LlamaForCausalLM) -> None:
    config = replace(CONFIG, neutral_weight=0.0)
    alone = learn_edit(tiny_llama, {"en": TEXTS["en"]}, [], NEURONS, NORMS, config)
    both = learn(tiny_llama, config)
    assert measure_nll(tiny_llama, TEXTS["fr"], both) < measure_nll(tiny_llama, TEXTS["fr"], alone)


def test_the_divergence_on_neutral_prompts_is_held_down_by_its_weight(tiny_llama: LlamaForCausalLM) -> None:
    def measure_divergence(learned: LearnedEdit) -> float:
        (text,) = NEUTRAL
        logits = []
        for placed in ([], [PlacedEdit(text.position, learned.deltas)]):
            with torch.no_grad(), apply_edits(tiny_llama, [placed]):
                logits.append(log_softmax(tiny_llama(torch.tensor([text.ids])).logits[0, -1], -1))
        return float((logits[0].exp() * (logits[0] - logits[1])).sum())

    free, held = (learn(tiny_llama, replace(CONFIG, neutral_weight=weight)) for weight in (0.0, 20.0))
    assert measure_divergence(held) < 0.5 * measure_divergence(free)


def test_a_change_stays_within_its_share_of_the_activations(tiny_llama: LlamaForCausalLM) -> None:
    learned = learn(tiny_llama, replace(CONFIG, clamp=0.2))
    for layer, (_, values) in learned.deltas.items():
        assert float(values.norm()) <= 0.2 * float(NORMS[layer]) * (1 + 1e-5)


def test_theta_beyond_the_clamp_is_shrunk_to_it() -> None:
    inside, outside = torch.tensor([0.3, 0.4]), torch.tensor([3.0, 4.0])
    clamp_norms([inside, outside], 1.0)
    torch.testing.assert_close(inside, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(outside, torch.tensor([0.6, 0.8]) * 2**0.5)


def test_a_target_is_scored_by_its_sum_and_its_argmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    score = score_target(logits, torch.tensor([0, 1]))
    assert score.nll.item() == pytest.approx(1.386294)  # 2 log 2
    assert score.is_greedy
    assert not score_target(logits, torch.tensor([0, 2])).is_greedy


def test_it_stops_where_every_target_is_the_greedy_answer(tiny_llama: LlamaForCausalLM) -> None:
    config, texts = replace(CONFIG, steps=200, neutral_weight=0.0), {}
    for name, text in TEXTS.items():
        prompt = text.ids[: text.start]
        second = tiny_llama(torch.tensor([prompt])).logits[0, -1].topk(2).indices[1]
        texts[name] = EditText([*prompt, int(second)], text.position, text.start)
    learned = learn_edit(tiny_llama, texts, [], NEURONS, NORMS, config)
    assert learned.is_greedy == {"en": True, "fr": True}
    assert 0 < learned.steps < 200
    again = learn_edit(tiny_llama, texts, [], NEURONS, NORMS, replace(config, steps=learned.steps - 1))
    assert not all(again.is_greedy.values())


def test_what_is_greedy_already_is_left_alone(tiny_llama: LlamaForCausalLM) -> None:
    prompt = [4, 9, 20, 21, 5, 6]
    answer = int(tiny_llama(torch.tensor([prompt])).logits[0, -1].argmax())
    learned = learn_edit(tiny_llama, {"en": EditText([*prompt, answer], 3, 6)}, [], NEURONS, NORMS, CONFIG)
    assert learned.steps == 0
    assert all(not values.any() for _, values in learned.deltas.values())


def test_the_prefix_that_is_read_once_changes_nothing(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = fact_edit._TextBatch(tiny_llama, [*TEXTS.values(), *NEUTRAL])
    assert fast.first == 2
    monkeypatch.setattr(fact_edit._TextBatch, "_read_prefix", lambda self, length: None)
    whole = fact_edit._TextBatch(tiny_llama, [*TEXTS.values(), *NEUTRAL])
    deltas = learn(tiny_llama).deltas
    pairs = [passages.list_targets(passages.read(deltas)) for passages in (fast, whole)]
    for (logits, target), (expected, expected_target) in zip(*pairs, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(target, expected_target)


def test_a_sliding_window_is_continued_as_well() -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, initializer_range=0.2,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    learned = learn(model)
    assert learned.after["en"] == pytest.approx(measure_nll(model, TEXTS["en"], learned), rel=1e-3)


def test_no_layer_beyond_the_neurons_is_edited(tiny_llama: LlamaForCausalLM) -> None:
    neurons = {0: torch.tensor([], dtype=torch.int64), 1: torch.tensor([4])}
    learned = learn_edit(tiny_llama, TEXTS, [], neurons, NORMS, CONFIG)
    assert list(learned.deltas) == [1]
