"""Every measure has one row in one table, and tables show it from there."""

import pytest

from potstill.core.measure_table import COSTS, MEASURES, QUALITIES, format_measure, list_columns


def test_every_measure_is_a_quality_or_a_cost_under_its_own_name() -> None:
    assert all(info.name == name for name, info in MEASURES.items())
    assert (*QUALITIES, *COSTS) == tuple(MEASURES)


@pytest.mark.parametrize(
    ("name", "value", "bounds", "text"),
    [
        pytest.param("bits_per_byte", 1.23456, (1.2, 1.3), "1.235 [1.200, 1.300]", id="an interval"),
        pytest.param("bytes", 3.0 * 2**20, (None, None), "3", id="a unit of its own"),
        pytest.param("parameters", 12345678.0, (None, None), "12.3M", id="a count"),
        pytest.param("decode_tokens_per_second", 9.96, (5.0, 12.0), "10.0", id="the range of the runs"),
        pytest.param("rouge_l", 20.0, (20.0, 20.0), "20.0", id="an interval of no width"),
    ],
)
def test_a_table_shows_a_value_with_its_interval(
    name: str, value: float, bounds: tuple[float | None, float | None], text: str
) -> None:
    assert format_measure(MEASURES[name].build(value, 5, low=bounds[0], high=bounds[1])) == text
    assert format_measure(None) == "-"


def test_a_table_has_the_columns_that_some_model_has() -> None:
    models = [
        {"perplexity": MEASURES["perplexity"].build(9.0, 1), "parameters": MEASURES["parameters"].build(9.0, 1)},
        {"bits_per_byte": MEASURES["bits_per_byte"].build(1.0, 1)},
    ]
    assert [info.name for info in list_columns(models)] == ["bits_per_byte", "parameters"]
