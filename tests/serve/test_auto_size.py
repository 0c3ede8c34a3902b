"""A server with `--size auto` answers with sizes of one model, and says which size new answers get."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.serving import load_tiny, open_client
from tests.transforms.small import packed

from potstill.core.errors import UsageError
from potstill.decode.drafters.options import DraftOptions
from potstill.models.elastic import get_sizes
from potstill.models.families.registry import export_model, import_model
from potstill.models.load import LoadedModel
from potstill.serve.auto_size import AutoSize
from potstill.serve.options import ServeOptions
from potstill.transforms.convert.registry import parse_conversion

BODY = {"prompt": "a wash", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def loaded() -> LoadedModel:
    """A tiny elastic model of 3, 2 and 1 layers."""
    tiny = load_tiny()
    to_elastic = parse_conversion("elastic:shares=1-0.6-0.2")
    model = export_model(to_elastic.convert(import_model(tiny.model), [packed(9, 8)])[0])
    return LoadedModel(model, tiny.tokenizer, "tiny", Path("tiny"), None, "")


def read_size(client: Any) -> float:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith("potstill:size{")]
    return float(line.rsplit(" ", 1)[1])


def test_a_generous_budget_answers_with_the_largest_size_and_a_narrow_one_with_the_smallest(
    loaded: LoadedModel,
) -> None:
    with open_client(loaded) as client:
        expected = client.post("/v1/completions", json=BODY).json()["choices"]
    for seconds, share in ((1e9, 1.0), (1e-9, 0.2)):
        with open_client(loaded, auto_size=AutoSize(token_seconds=seconds), slots=2) as client:
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: client.post("/v1/completions", json=BODY).json(), range(4)))
            assert (answers[0]["choices"] == expected) == (share == 1)
            assert all(answer["choices"] == answers[0]["choices"] for answer in answers)
            assert read_size(client) == share
            engine = client.app.state.served.worker._engine  # type: ignore[attr-defined]
    weights = {weight.untyped_storage().data_ptr() for weight in loaded.model.parameters()}
    for part in engine.engines:
        assert {weight.untyped_storage().data_ptr() for weight in part.runner.model.parameters()} <= weights
    assert len(engine.engines) == len(get_sizes(loaded.model)) == 3


def test_the_budget_is_that_of_the_largest_size_in_a_quarter_of_the_slots(loaded: LoadedModel) -> None:
    engine = AutoSize().make_engine(loaded, slots=8, context=64)
    assert engine.schedule.budget == engine.schedule.estimate(0, 2)
    assert [sorted(points) for points in engine.schedule.seconds] == [[1, 2, 8]] * 3


def test_a_model_without_sizes_and_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="tiny has one size alone"):
        AutoSize().make_engine(load_tiny(), slots=2, context=64)
    for options, message in (
        ({"size": "0.5"}, r"one size is a model of its own, such as MODEL#0\.5"),
        ({"token_seconds": 0.1}, "needs --size auto"),
        ({"size": "auto", "token_seconds": 0.0}, "must be above 0"),
        ({"size": "auto", "drafts": DraftOptions(draft="lookup")}, "decodes without drafts"),
    ):
        with pytest.raises(UsageError, match=message):
            ServeOptions(**options)
