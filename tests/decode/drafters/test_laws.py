"""Laws of every registered drafter: the text is that of plain decoding, or has its law, and ends where it must."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from tests.decode.drafters.targets import (
    BUILDS,
    CHOSEN,
    DRAWN,
    FAMILIES,
    VARIANTS,
    make_runner,
    make_speculation,
    make_target,
)
from tests.decode.families import HYBRIDS
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel
from potstill.decode.draft_length import FixedLength
from potstill.decode.drafters.model_drafter import ModelDrafter
from potstill.decode.drafters.registry import DRAFTERS
from potstill.decode.engine import Engine
from potstill.decode.request import Completion, DecodeRequest
from potstill.decode.sampling import Sampling, SamplingFilters
from potstill.decode.speculative import Speculation

CHAIN, TREE = (1, 1, 1, 1), (3, 2, 1)
LENGTHS = (4, 1, 9, 30)
FILTERS = SamplingFilters(top_k=20, top_p=0.95, repetition_penalty=1.2)


def make_requests(
    vocabulary: int, *, count: int = 4, temperature: float = 0.0, new_tokens: int = 200
) -> list[DecodeRequest]:
    """Requests of different lengths for ids that are ASCII letters."""
    generator = torch.Generator().manual_seed(7)
    sampling = Sampling(vocabulary=vocabulary, stop=frozenset(), temperature=temperature)
    return [
        DecodeRequest(
            prompt=torch.randint(3, vocabulary, (LENGTHS[n],), generator=generator).tolist(),
            max_new_tokens=new_tokens - 7 * n,
            sampling=sampling,
            seed=n,
        )
        for n in range(count)
    ]


def run(
    model: PreTrainedModel, requests: list[DecodeRequest], speculation: Speculation | None = None
) -> tuple[list[Completion], Engine]:
    engine = Engine(make_runner(model), speculation=speculation)
    ids = [engine.add(request) for request in requests]
    completions = engine.run()
    return [completions[request_id] for request_id in ids], engine


def test_every_registered_drafter_is_tested() -> None:
    assert set(BUILDS) == {*DRAFTERS, *VARIANTS} == {*CHOSEN, *DRAWN}


SHAPES = pytest.mark.parametrize("widths", [CHAIN, TREE], ids=["chain", "tree"])


@SHAPES
@pytest.mark.parametrize("name", BUILDS)
def test_greedy_text_with_drafts_is_plain_greedy_text(name: str, widths: tuple[int, ...]) -> None:
    family = FAMILIES[(list(BUILDS).index(name) + len(widths)) % len(FAMILIES)]
    check_greedy_text(name, family, widths, new_tokens=36)


@pytest.mark.slow
@SHAPES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BUILDS)
def test_200_greedy_tokens_with_drafts_are_plain_greedy_tokens_in_every_family(
    name: str, family: str, widths: tuple[int, ...]
) -> None:
    check_greedy_text(name, family, widths, new_tokens=200)


@pytest.mark.parametrize("name", ["lookup", "model", "skip"])
def test_greedy_text_over_recurrences_with_drafts_is_plain_greedy_text(name: str) -> None:
    check_greedy_text(name, "deltanet", CHAIN, new_tokens=23)


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("name", BUILDS)
def test_100_greedy_tokens_over_recurrences_with_drafts_are_plain_greedy_tokens(name: str, family: str) -> None:
    check_greedy_text(name, family, CHAIN, new_tokens=100)


@pytest.mark.parametrize("name", ["suffix", "model"])
def test_a_tree_over_recurrences_is_refused(name: str) -> None:
    model = make_target("deltanet")
    with pytest.raises(UnsupportedModel, match="one chain of tokens can continue, but no tree; omit --tree"):
        run(model, make_requests(model.config.vocab_size), make_speculation(name, model, TREE))


def check_greedy_text(name: str, family: str, widths: tuple[int, ...], *, new_tokens: int) -> None:
    """One text alone, and four of different lengths together."""
    model = make_target(family, dtype=torch.float64 if family in HYBRIDS else torch.float32)
    requests = make_requests(model.config.vocab_size, new_tokens=new_tokens)
    plain = [completion.tokens for completion in run(model, requests)[0]]
    for count in (1, 4):
        drafted, engine = run(model, requests[:count], make_speculation(name, model, widths))
        assert [completion.tokens for completion in drafted] == plain[:count]
        assert engine.stats.drafted > 0


@SHAPES
@pytest.mark.parametrize("name", ["model", "lookup"])
def test_the_same_holds_in_float64_with_the_network_of_hugging_face(name: str, widths: tuple[int, ...]) -> None:
    model = make_target("qwen2", dtype=torch.float64)
    requests = make_requests(model.config.vocab_size, new_tokens=30)
    plain, _ = run(model, requests)
    drafted, _ = run(model, requests, make_speculation(name, model, widths))
    assert [completion.tokens for completion in drafted] == [completion.tokens for completion in plain]


@SHAPES
@pytest.mark.parametrize("name", CHOSEN)
def test_sampled_text_with_chosen_drafts_is_plain_sampled_text(name: str, widths: tuple[int, ...]) -> None:
    model = make_target("llama")
    requests = make_requests(model.config.vocab_size, temperature=0.3, new_tokens=40)
    requests = [replace(r, sampling=replace(r.sampling, filters=FILTERS)) for r in requests]
    plain, _ = run(model, requests)
    drafted, engine = run(model, requests, make_speculation(name, model, widths))
    assert [completion.tokens for completion in drafted] == [completion.tokens for completion in plain]
    assert engine.stats.drafted > 0


@pytest.mark.parametrize("name", ["lookup", *(pytest.param(name, marks=pytest.mark.slow) for name in CHOSEN[1:])])
def test_sampled_text_over_recurrences_with_chosen_drafts_is_plain_sampled_text(name: str) -> None:
    model = make_target("deltanet", dtype=torch.float64)
    requests = make_requests(model.config.vocab_size, temperature=0.3, new_tokens=26)
    plain, _ = run(model, requests)
    drafted, engine = run(model, requests, make_speculation(name, model, CHAIN))
    assert [completion.tokens for completion in drafted] == [completion.tokens for completion in plain]
    assert engine.stats.drafted > 0


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("widths", [(1, 1), (2, 1)], ids=["chain", "tree"])
@pytest.mark.parametrize("name", DRAWN)
def test_sampled_text_with_drawn_drafts_has_the_law_of_plain_sampling(
    name: str, widths: tuple[int, ...], count: int
) -> None:
    check_law(name, "llama", widths, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWN)
def test_sampled_text_over_recurrences_with_drawn_drafts_has_the_law_of_plain_sampling(name: str) -> None:
    check_law(name, "deltanet", (1, 1), 500)


def check_law(name: str, family: str, widths: tuple[int, ...], count: int) -> None:
    """Chi-square of `count` sampled texts over 4 letters against the exact law of the model."""
    vocabulary, length, prompt = 4, 2 if count < 1000 else 3, [3, 1, 2]
    model = make_target(family, vocabulary=vocabulary)
    sampling = Sampling(vocabulary=vocabulary, stop=frozenset(), temperature=1.5)
    requests = [
        DecodeRequest(prompt=prompt, max_new_tokens=length + 1, sampling=sampling, seed=seed) for seed in range(count)
    ]
    completions, engine = run(model, requests, make_speculation(name, model, widths))
    assert 0 < engine.stats.accepted < engine.stats.drafted
    counts = Counter(tuple(completion.tokens[:length]) for completion in completions)
    texts = list(product(range(vocabulary), repeat=length))
    with torch.no_grad():
        rows = model(torch.tensor([[*prompt, *text] for text in texts])).logits[:, len(prompt) - 1 : -1]
    log_p = (rows.double() / sampling.temperature).log_softmax(-1)
    expected = count * log_p.gather(-1, torch.tensor(texts)[..., None]).sum((1, 2)).exp()
    observed = torch.tensor([counts[text] for text in texts], dtype=torch.float64)
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(texts) - 1
    assert statistic < freedom + 3.3 * (2 * freedom) ** 0.5 + 5, "beyond the 0.999 quantile of chi-square"


@pytest.mark.parametrize("name", [*DRAWN, "lookup"])
def test_a_sampled_text_depends_on_its_seed_and_on_no_other_text(name: str) -> None:
    model = make_target("llama")
    requests = make_requests(model.config.vocab_size, temperature=1.0, new_tokens=28)
    together, _ = run(model, requests, make_speculation(name, model, TREE))
    alone = [run(model, [request], make_speculation(name, model, TREE))[0][0] for request in requests]
    assert [completion.tokens for completion in together] == [completion.tokens for completion in alone]


def test_typical_acceptance_is_greedy_at_temperature_0_and_keeps_more_above() -> None:
    model = make_target("llama")
    requests = make_requests(model.config.vocab_size, new_tokens=30)
    plain, _ = run(model, requests)
    typical, _ = run(model, requests, make_speculation("model", model, CHAIN, typical=True))
    assert [completion.tokens for completion in typical] == [completion.tokens for completion in plain]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
def test_a_text_ends_at_its_limit_inside_a_draft(limit: int) -> None:
    model = make_target("llama")
    requests = make_requests(model.config.vocab_size, count=1, new_tokens=limit)
    plain, _ = run(model, requests)
    drafted, _ = run(model, requests, perfect_speculation(model))
    assert drafted[0].tokens == plain[0].tokens
    assert len(drafted[0].tokens) == limit
    assert drafted[0].finish_reason == "length"


@pytest.mark.parametrize("place", [0, 1, 2, 3, 6])
def test_a_text_ends_at_its_stop_token_inside_a_draft(place: int) -> None:
    model = make_target("llama")
    request = make_requests(model.config.vocab_size, count=1, new_tokens=12)[0]
    tokens = run(model, [request])[0][0].tokens
    stop = replace(request, sampling=replace(request.sampling, stop=frozenset({tokens[place]})))
    drafted = run(model, [stop, request], perfect_speculation(model))[0]
    assert drafted[0].tokens == tokens[: tokens.index(tokens[place]) + 1]
    assert drafted[0].finish_reason == "stop"
    assert drafted[1].tokens == tokens


def perfect_speculation(model: PreTrainedModel) -> Speculation:
    """The target as its own draft: every token is kept."""
    return Speculation(drafter=ModelDrafter(make_runner(model), widths=CHAIN), length=FixedLength(len(CHAIN)))


def test_the_target_as_its_own_draft_keeps_every_token() -> None:
    model = make_target("llama")
    for temperature in (0.0, 1.0):
        requests = make_requests(model.config.vocab_size, temperature=temperature, new_tokens=41)
        _, engine = run(model, requests[:1], perfect_speculation(model))
        # a token from the prompt, then five with each pass: a draft that lacks its last token would fail here
        assert engine.stats.steps == 8
        assert engine.stats.accepted == engine.stats.drafted == 32
        assert engine.stats.accepted_at == engine.stats.drafted_at == [8, 8, 8, 8]
