"""Records of the real loop, and what is predicted from them."""

import itertools

import pytest
import torch
from tests.decode.drafters.targets import BUILDS, make_target

from potstill.core.errors import DataError
from potstill.decode.draft_length import FixedLength, interpolate
from potstill.decode.drafters.drafter import Drafter
from potstill.decode.engine import Engine
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.decode.speculative import Speculation
from potstill.evaluate.speculation.candidates import Candidate, Setting
from potstill.evaluate.speculation.prediction import (
    Evidence,
    Prediction,
    collect_evidence,
    compute_acceptance,
    time_verification,
)
from potstill.evaluate.speculation.recording import (
    CycleLength,
    DraftPass,
    RecordedText,
    WrongDrafter,
    compute_medians,
    record_text,
    schedule_lengths,
)
from potstill.evaluate.speculation.replay import fill_unknown, read_tokens, replay

LENGTHS, TOKENS = (1, 2, 4, 6), 40


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    model = make_target("llama")
    return ModelRunner(model, vocabulary=model.config.vocab_size)


def make_requests(runner: ModelRunner, *, stop: frozenset[int] = frozenset()) -> list[DecodeRequest]:
    sampling = Sampling(vocabulary=runner.vocabulary, stop=stop, temperature=0.0)
    return [DecodeRequest(prompt=[5 + n, 9, 20, 9, 20 + n], max_new_tokens=TOKENS, sampling=sampling) for n in range(3)]


def make_candidate(runner: ModelRunner, drafter: Drafter) -> Candidate:
    speculation = Speculation(drafter=drafter, length=FixedLength(LENGTHS[-1]), nodes=LENGTHS[-1])
    return Candidate(draft="model", speculation=speculation, lengths=LENGTHS)


@pytest.mark.parametrize("name", ["model", "lookup", "suffix", "exit", "skip"])
def test_a_replay_has_the_passes_of_the_real_loop(runner: ModelRunner, name: str) -> None:
    candidate = make_candidate(runner, BUILDS[name](runner.model, (1,) * LENGTHS[-1]))
    recorded = candidate.make_recorded()
    recorded.length = CycleLength([LENGTHS[-1]])
    for request in make_requests(runner):
        text = record_text(runner, request, recorded)
        unknown = read_tokens(text)
        (record,) = fill_unknown([unknown])
        for length in LENGTHS:
            candidate.speculation.drafter.forget()
            engine = Engine(runner, speculation=candidate.make_speculation(Setting("model", length=length)))
            engine.add(request)
            engine.run()
            passes = replay(record, length, max_new_tokens=TOKENS)
            num_unknown = sum(hit is None for hit in unknown.hits[1:-1])
            slack = num_unknown + (4 if name in ("lookup", "suffix") else 0)  # their choice depends on the start
            assert abs(len(passes) - engine.stats.steps) <= slack


def test_a_record_ends_with_its_text_also_at_a_stop_token(runner: ModelRunner) -> None:
    (request, *_) = make_requests(runner)
    engine = Engine(runner)
    engine.add(request)
    (completion,) = engine.run().values()
    stop = completion.tokens[17]
    (request, *_) = make_requests(runner, stop=frozenset({stop}))
    candidate = make_candidate(runner, BUILDS["skip"](runner.model, (1,) * LENGTHS[-1]))
    text = record_text(runner, request, candidate.make_recorded())
    assert text.num_tokens == completion.tokens.index(stop) + 1
    assert 1 + sum(each.accepted + 1 for each in text.passes) == text.num_tokens


def test_evidence_has_times_of_every_length_and_predicts_every_setting(runner: ModelRunner) -> None:
    candidate = make_candidate(runner, BUILDS["exit"](runner.model, (1,) * LENGTHS[-1]))
    widths = (3, 2)
    tree = Candidate(
        draft="exit",
        speculation=Speculation(
            drafter=BUILDS["exit"](runner.model, widths), length=FixedLength(2), nodes=9, siblings=3
        ),
        tree="3,2",
    )
    chain, branches = collect_evidence(runner, make_requests(runner), [candidate, tree])
    assert set(chain.verify_seconds) == set(range(LENGTHS[-1] + 1))
    assert set(LENGTHS) <= set(chain.draft_seconds)
    assert 9 in branches.verify_seconds
    for each in (chain, branches):
        for setting in each.candidate.settings:
            prediction = each.predict(setting, max_new_tokens=TOKENS)
            assert 1 <= prediction.tokens_per_pass <= 1 + len(prediction.acceptance)
            assert prediction.speed_up > 0
    with pytest.raises(DataError, match="ends with its first token"):
        collect_evidence(runner, make_requests(runner, stop=frozenset(range(runner.vocabulary))), [candidate])


def test_the_prediction_is_the_quotient_of_tokens_and_time() -> None:
    passes = [DraftPass(1, 2, 2, 2, 1), DraftPass(3, 2, 2, 2, 0), DraftPass(4, 2, 0, 0, 0), DraftPass(5, 2, 2, 2, 2)]
    evidence = Evidence(
        candidate=make_candidate_of(2),
        texts=[RecordedText(passes, 8)],
        draft_seconds={2: 0.5},
        verify_seconds={0: 1.0, 2: 1.5},
        plain_seconds=1.0,
    )
    prediction = evidence.predict(Setting("lookup", length=2), max_new_tokens=100)
    seconds = 4 * 0.5 + 3 * 1.5 + 1.0
    assert prediction.tokens_per_pass == pytest.approx(7 / 4)
    assert list(prediction.acceptance) == pytest.approx([2 / 4, 1 / 2])
    assert prediction.speed_up == pytest.approx(7 / seconds)


def make_candidate_of(length: int) -> Candidate:
    speculation = Speculation(drafter=WrongDrafter(50), length=FixedLength(length), nodes=length)
    return Candidate(draft="lookup", speculation=speculation, lengths=(length,))


def test_acceptance_by_position_gives_the_mean_number_of_tokens() -> None:
    accepted = [0, 3, 1, 1, 0, 2, 3]
    acceptance = compute_acceptance([DraftPass(1, 3, 3, 3, k) for k in accepted])
    prediction = Prediction(acceptance=acceptance, draft_cost=0.25, verify_cost=1.25)
    assert acceptance == pytest.approx([5 / 7, 3 / 5, 2 / 3])
    assert prediction.tokens_per_pass == pytest.approx(1 + sum(accepted) / len(accepted))
    assert prediction.speed_up == pytest.approx(prediction.tokens_per_pass / 1.5)
    assert compute_acceptance([DraftPass(1, 2, 2, 2, 0)]) == [0.0, 0.0]


def test_times_are_medians_by_size_with_lines_between() -> None:
    passes = [
        DraftPass(1, 4, size, size, 0, seconds / 10, seconds) for size, seconds in ((4, 9.0), (0, 1.0), (4, 5), (4, 6))
    ]
    assert time_verification([RecordedText(passes, 9)]) == {0: 1.0, 4: 6.0}
    assert compute_medians(passes, lambda each: each.limit, lambda each: each.draft_seconds) == {4: 0.55}
    assert interpolate({0: 1.0, 4: 6.0}, (0, 2, 4, 9)) == [1.0, 3.5, 6.0, 6.0]


def test_lengths_take_turns_and_the_longest_comes_most() -> None:
    cycle = CycleLength(schedule_lengths((1, 2, 4)))
    lengths = list(itertools.islice(iter(cycle.choose, None), 8))
    assert (cycle.longest, lengths) == (4, [4, 4, 4, 1, 4, 4, 4, 2])
    assert schedule_lengths((5,)) == [5]


def test_wrong_drafts_are_rejected_and_of_the_length_that_is_due(runner: ModelRunner) -> None:
    candidate = make_candidate(runner, WrongDrafter(runner.vocabulary))
    texts = [record_text(runner, request, candidate.make_recorded()) for request in make_requests(runner)]
    passes = [each for text in texts for each in text.passes]
    assert all(each.size == each.limit for each in passes)
    assert torch.tensor([each.accepted for each in passes]).double().mean() < 0.2
