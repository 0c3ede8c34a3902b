"""When a method counts as better: on scores that are made up, where the truth is known."""

import numpy as np
import pytest

from potstill.evaluate.agreement import TeacherComparison
from potstill.evaluate.bootstrap import Difference
from potstill.evaluate.measures import ModelEvaluation
from potstill.evaluate.perplexity import Scores
from potstill.evaluate.rouge import ScoredAnswers
from potstill.evaluate.significance import BETTER, INCONCLUSIVE, WORSE, compare_methods, decide_verdict

DOCUMENTS = 60


def judged(shift: float, *, seed: int = 0, noise: float = 0.1, answers: bool = False) -> ModelEvaluation:
    """A model that pays `shift` nats a token more than the documents are hard, and agrees as much less."""
    hard, own = np.random.default_rng(7), np.random.default_rng(seed)
    tokens = hard.integers(50, 200, DOCUMENTS).astype(float)
    nats = tokens * (3 + hard.normal(0, 1, DOCUMENTS) + shift + own.normal(0, noise, DOCUMENTS))
    scores = Scores(nats, tokens.astype(int), (4 * tokens).astype(int))
    seen = TeacherComparison(
        scores,
        kl=tokens * (1 + shift),
        top1_matches=tokens * (0.5 - shift),
        acceptance=tokens * (0.5 - shift),
        num_tokens=scores.num_tokens,
    )
    return ModelEvaluation([], seen, ScoredAnswers([""] * 9, np.linspace(20, 40, 9) - 10 * shift) if answers else None)


def of(name: str, found):
    return next(one for one in found if one.name == name)


def test_what_is_better_beyond_documents_and_seeds_is_called_so_in_every_direction() -> None:
    ours = [judged(-0.2, seed=s, answers=True) for s in (1, 2, 3)]
    theirs = [judged(0.0, seed=s, answers=True) for s in (4, 5, 6)]
    found = compare_methods(ours, theirs)
    assert [one.name for one in found] == ["bits_per_byte", "teacher_kl", "teacher_agreement", "rouge_l"]
    assert {one.verdict for one in found} == {BETTER}
    assert {one.verdict for one in compare_methods(theirs, ours)} == {WORSE}
    assert of("bits_per_byte", found).mean_difference.value == pytest.approx(-0.2 / np.log(2) / 4, abs=0.01)


def test_the_pooled_difference_is_the_mean_of_those_of_the_seeds() -> None:
    ours, theirs = ([judged(shift, seed=s) for s, shift in enumerate(shifts)] for shifts in ((0.1, 0.3), (0.0, 0.1)))
    for one in compare_methods(ours, theirs):
        assert one.mean_difference.value == pytest.approx(np.mean([seed.value for seed in one.seed_differences]))


def test_what_one_seed_says_otherwise_is_not_told_apart() -> None:
    ours = [judged(shift, seed=s) for s, shift in enumerate((-0.5, -0.5, 0.05))]
    theirs = [judged(0.0, seed=9 + s) for s in range(3)]
    found = of("bits_per_byte", compare_methods(ours, theirs))
    assert found.mean_difference.high < 0
    assert (found.verdict, found.reason) == (INCONCLUSIVE, "seeds differ by as much")


def test_what_the_documents_do_not_say_is_not_told_apart() -> None:
    ours, theirs = ([judged(0.0, seed=base + s, noise=0.5) for s in range(3)] for base in (0, 10))
    found = of("bits_per_byte", compare_methods(ours, theirs))
    assert (found.verdict, found.reason) == (INCONCLUSIVE, "documents differ by as much")


def test_a_method_is_not_told_apart_from_itself() -> None:
    same = [judged(0.1, seed=s, answers=True) for s in range(2)]
    assert {one.verdict for one in compare_methods(same, same)} == {INCONCLUSIVE}


def test_two_methods_of_one_truth_are_seldom_told_apart() -> None:
    draws = [[judged(0.0, seed=1000 * n + s) for s in range(6)] for n in range(40)]
    told = [of("bits_per_byte", compare_methods(six[:3], six[3:])).verdict != INCONCLUSIVE for six in draws]
    assert np.mean(told) <= 0.15


@pytest.mark.parametrize(
    ("low", "high", "seeds", "better", "told"),
    [
        (-0.2, -0.1, (-0.1, -0.2), "lower", (BETTER, "in all 2 seeds")),
        (-0.2, -0.1, (-0.1, -0.2), "higher", (WORSE, "in all 2 seeds")),
        (0.1, 0.2, (0.15,), "higher", (BETTER, "on one seed alone")),
        (-0.2, -0.1, (-0.4, 0.0), "lower", (INCONCLUSIVE, "seeds differ by as much")),
        (-0.1, 0.2, (0.1, 0.1), "lower", (INCONCLUSIVE, "documents differ by as much")),
        (float("nan"), float("nan"), (0.1,), "lower", (INCONCLUSIVE, "documents differ by as much")),
    ],
)
def test_the_rule(low: float, high: float, seeds: tuple[float, ...], better: str, told: tuple[str, str]) -> None:
    pooled = Difference(float(np.mean(seeds)), low, high, 0.5)
    assert decide_verdict(pooled, seeds, better=better) == told


def test_a_single_document_has_no_interval_and_the_json_says_so() -> None:
    one = ModelEvaluation([], Scores(np.array([3.0]), np.array([2]), np.array([8])))
    (found,) = compare_methods([one], [one])
    assert (found.to_dict()["low"], found.to_dict()["seeds"][0]["high"]) == (None, None)
