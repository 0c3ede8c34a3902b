"""The load at its start gives a text its size, and the text is what this size alone writes."""

import heapq
from collections import deque
from itertools import pairwise

import pytest
import torch
from tests.decode.test_engine import GREEDY, make_requests
from tests.transforms.small import packed
from transformers import LlamaForCausalLM, PreTrainedModel

from potstill.core.errors import UsageError
from potstill.decode.elastic_engine import ElasticEngine
from potstill.decode.engine import Engine
from potstill.decode.request import DecodeRequest, TokenEvent
from potstill.decode.runner import ModelRunner
from potstill.decode.size_schedule import SizeSchedule
from potstill.models.elastic import copy_size, get_sizes, slice_model
from potstill.models.families.registry import export_model, import_model
from potstill.transforms.convert.registry import parse_conversion

TABLE = ({1: 4.0, 4: 10.0}, {1: 2.0, 4: 5.0}, {1: 1.0, 4: 2.5})  # seconds of a step of three sizes
SLOTS = 4


@pytest.fixture
def model(tiny_llama: LlamaForCausalLM) -> PreTrainedModel:
    to_elastic = parse_conversion("elastic:shares=1-0.6-0.2,dims=both")
    return export_model(to_elastic.convert(import_model(tiny_llama.double()), [packed(9, 8)])[0])


def make_engine(model: PreTrainedModel, schedule: SizeSchedule) -> ElasticEngine:
    views = [slice_model(model, size.share) for size in get_sizes(model)]
    engines = [Engine(ModelRunner(view, vocabulary=259, slots=SLOTS)) for view in views]
    return ElasticEngine(engines, schedule, slots=SLOTS)


def run_alone(model: PreTrainedModel, request: DecodeRequest) -> list[int]:
    engine = Engine(ModelRunner(model, vocabulary=259))
    request_id = engine.add(request)
    return engine.run()[request_id].tokens


def collect(events: list[TokenEvent], texts: dict[int, list[int]]) -> None:
    for event in events:
        if event.token is not None:
            texts.setdefault(event.request_id, []).append(event.token)


def test_each_text_is_that_of_its_size_whatever_is_written_beside_it(model: PreTrainedModel) -> None:
    requests, texts = make_requests(GREEDY), dict[int, list[int]]()
    engine = make_engine(model, SizeSchedule(TABLE, budget=6.0))
    sizes: dict[int, int] = {}
    for number, request in enumerate(requests):  # two more with every step: the load grows
        sizes[engine.add(request)] = -1
        if number % 2 == 0:
            continue
        collect(engine.step(), texts)
        for size, ids in enumerate(engine._ids):
            for request_id in ids.values():
                assert sizes[request_id] in (-1, size)  # a text keeps its size
                sizes[request_id] = size
        assert engine.num_active <= SLOTS
    while engine.has_work:
        collect(engine.step(), texts)
        for size, ids in enumerate(engine._ids):
            sizes |= dict.fromkeys(ids.values(), size)
        assert engine.num_active <= SLOTS
    assert len(set(sizes.values())) == 3
    copies = [copy_size(model, size.share) for size in get_sizes(model)]
    for request_id, size in sizes.items():
        assert texts[request_id] == run_alone(copies[size], requests[request_id])
    assert engine.stats.tokens == sum(map(len, texts.values()))


def test_a_cancelled_request_ends_wherever_it_is(model: PreTrainedModel) -> None:
    engine = make_engine(model, SizeSchedule(TABLE, budget=6.0))
    ids = [engine.add(request) for request in make_requests(GREEDY)[:6]]
    engine.step()
    assert (engine.num_active, engine.num_queued) == (4, 2)
    for request_id in (ids[0], ids[5], 99):
        engine.cancel(request_id)
    ended = {event.request_id for event in engine.step() if event.finish_reason == "cancelled"}
    assert ended == {ids[0], ids[5]}
    assert (engine.num_active, engine.num_queued) == (3, 1)
    with pytest.raises(UsageError, match="no token"):
        engine.add(DecodeRequest(prompt=[], max_new_tokens=1, sampling=GREEDY))


def test_the_largest_size_within_the_budget_is_chosen() -> None:
    for load in range(1, 20):
        schedule = SizeSchedule(TABLE, budget=6.0)
        size = schedule.choose(load)
        feasible = [n for n in range(3) if schedule.estimate(n, load) <= 6.0]
        assert size == (feasible[0] if feasible else 2)
    assert SizeSchedule(TABLE, budget=6.0).estimate(1, 8) == 10.0  # twice as many as slots
    loads = [SizeSchedule(TABLE, budget=6.0).choose(load) for load in range(1, 20)]
    assert all(a <= b for a, b in pairwise(loads))


def test_a_load_near_a_limit_does_not_switch_back_and_forth() -> None:
    schedule = SizeSchedule(TABLE, budget=6.0)
    assert schedule.estimate(0, 2) == 6.0
    assert [schedule.choose(load) for load in (2, 3, 2, 3, 2)] == [0, 1, 1, 1, 1]
    assert schedule.choose(1) == 0


def simulate(schedule: SizeSchedule, arrivals: list[float]) -> tuple[float, float]:
    """(the 95th percentile of the waits for a token, mean quality) of texts of 20 tokens; a smaller size loses 0.25."""
    waiting, running, waits, quality = deque(sorted(arrivals)), list[tuple[int, int]](), list[float](), list[float]()
    now, queue = 0.0, deque[float]()
    while waiting or queue or running:
        while waiting and waiting[0] <= now:
            queue.append(waiting.popleft())
        if not running and not queue:
            now = waiting[0]
            continue
        while queue and len(running) < SLOTS:
            size = schedule.choose(len(running) + len(queue))
            waits.append(now - queue.popleft())
            running.append((size, 20))
            quality.append(1 - 0.25 * size)
        counts = [sum(size == n for size, _ in running) for n in range(3)]
        seconds = sum(schedule.estimate(n, count) for n, count in enumerate(counts) if count)
        now += seconds
        waits += [seconds] * len(running)
        running = [(size, left - 1) for size, left in running if left > 1]
    return heapq.nlargest(len(waits) // 20, waits)[-1], sum(quality) / len(quality)


def test_an_elastic_model_waits_less_than_the_largest_and_is_better_than_the_smallest() -> None:
    generator = torch.Generator().manual_seed(2)
    gaps = torch.empty(120).exponential_(1 / 60, generator=generator)
    gaps[40:80] /= 4  # a burst
    arrivals = gaps.cumsum(0).tolist()
    elastic = simulate(SizeSchedule(TABLE, budget=6.0), arrivals)
    large, small = (simulate(SizeSchedule([TABLE[n]] * 3, budget=1e9), arrivals)[0] for n in (0, 2))
    assert elastic[0] < large
    assert small <= elastic[0]
    assert elastic[1] > 0.5  # the quality of the smallest size
