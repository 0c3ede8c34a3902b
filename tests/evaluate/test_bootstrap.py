import numpy as np
import pytest

from potstill.evaluate import bootstrap
from potstill.evaluate.bootstrap import bootstrap_interval, measure_ratio, paired_bootstrap


def documents(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(50, 500, n).astype(float)
    return sizes * rng.gamma(4, 0.3, n), sizes


def test_the_value_is_the_ratio_of_the_sums():
    found = bootstrap_interval(np.array([1.0, 2.0, 6.0]), np.array([1.0, 1.0, 4.0]))
    assert found.value == 1.5
    assert found.low <= found.value <= found.high


def test_a_measure_is_a_mean_or_a_ratio_with_bounds_from_two_documents_on():
    mean = measure_ratio("rouge_l", np.array([1.0, 3.0]))
    assert (mean.low, mean.value, mean.high, mean.n) == (1, 2, 3, 2)
    ratio = measure_ratio("perplexity", np.array([2.0]), np.array([4]), transform=np.exp, count=9, note="of one text")
    assert (ratio.low, ratio.value, ratio.high, ratio.n, ratio.note) == (None, np.exp(0.5), None, 9, "of one text")


def test_two_documents_give_the_quantiles_of_their_four_draws():
    # both ways of drawing one twice have probability 1/4, so the 2.5 and 97.5 % quantiles are the extremes
    found = bootstrap_interval(np.array([1.0, 3.0]), np.ones(2))
    assert (found.low, found.value, found.high) == (1, 2, 3)


def test_the_interval_of_many_fair_coins_is_that_of_the_normal_law():
    coins = np.resize([0.0, 1.0], 4000)
    half = 1.96 * 0.5 / np.sqrt(4000)
    for found in (bootstrap_interval(coins, np.ones(4000)), paired_bootstrap(coins, np.zeros(4000), np.ones(4000))):
        assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.08 * half)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    truth = 4 * 0.3  # the mean of the gamma law; sizes are independent of it
    found = [bootstrap_interval(*documents(60, seed), num_resamples=400, seed=seed) for seed in range(300)]
    hits = np.mean([low <= truth <= high for _, low, high in found])
    assert 0.89 <= hits <= 0.98


def test_the_interval_narrows_with_the_root_of_the_documents():
    few, many = bootstrap_interval(*documents(100)), bootstrap_interval(*documents(10_000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(10, rel=0.3)


def test_equal_documents_have_no_spread():
    found = bootstrap_interval(np.full(9, 2.0), np.full(9, 4.0))
    assert found == (0.5, 0.5, 0.5)


def test_the_unit_of_the_denominator_rescales_all():
    above, below = documents(40)
    assert bootstrap_interval(above, below) == pytest.approx(np.array(bootstrap_interval(above, below * 8)) * 8)


def test_an_increasing_transform_moves_value_and_bounds():
    plain, moved = bootstrap_interval(*documents(40)), bootstrap_interval(*documents(40), transform=np.exp)
    assert moved == pytest.approx(np.exp(plain), rel=1e-3)


def test_the_same_seed_gives_the_same_interval_and_another_nearly_the_same():
    columns = documents(50)
    assert bootstrap_interval(*columns) == bootstrap_interval(*columns)
    assert bootstrap_interval(*columns, seed=1) != bootstrap_interval(*columns)
    assert bootstrap_interval(*columns, seed=1) == pytest.approx(bootstrap_interval(*columns), rel=0.05)


def test_how_many_draws_are_made_at_once_changes_nothing(monkeypatch):
    columns = documents(50)
    whole = bootstrap_interval(*columns)
    monkeypatch.setattr(bootstrap, "_MAX_INDICES", 333)
    assert bootstrap_interval(*columns) == whole


def test_one_document_has_no_interval():
    assert np.isnan(bootstrap_interval(np.ones(1), np.ones(1))[1:]).all()
    assert np.isnan(paired_bootstrap(np.ones(1), np.zeros(1), np.ones(1))[1:]).all()


def test_draws_of_nothing_but_empty_documents_are_left_out():
    found = bootstrap_interval(np.array([0.0, 0.0, 4.0]), np.array([0.0, 0.0, 2.0]))
    assert found == (2, 2, 2)


def test_a_model_does_not_differ_from_itself():
    above, below = documents(30)
    assert paired_bootstrap(above, above, below) == (0, 0, 0, 0.5)


def test_the_difference_turns_its_sign_with_its_sides():
    (a, below), b = documents(30), documents(30, 1)[0]
    one, other = paired_bootstrap(a, b, below), paired_bootstrap(b, a, below)
    assert one[:3] == pytest.approx((-other.value, -other.high, -other.low))
    assert one.probability == pytest.approx(1 - other.probability)


def test_pairing_sees_a_small_constant_gain_that_two_intervals_hide():
    above, below = documents(60)
    better = above - 0.02 * below
    gain = paired_bootstrap(better, above, below)
    assert gain == pytest.approx((-0.02, -0.02, -0.02, 1))
    assert bootstrap_interval(better, below).high > bootstrap_interval(above, below).low


def test_the_probability_is_that_of_the_first_being_lower():
    a, b, below = np.array([0.0, 3.0]), np.array([1.0, 1.0]), np.ones(2)
    # draws of (-1, 2): the mean is -1 in a quarter, 0.5 in a half, 2 in a quarter
    assert paired_bootstrap(a, b, below, num_resamples=20_000).probability == pytest.approx(0.25, abs=0.02)
