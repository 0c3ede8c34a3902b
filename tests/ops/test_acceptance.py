"""Acceptance rules: the law of their tokens by exact enumeration, golden numbers, formulas.

The enumeration takes a toy language: a table of distributions over 3 or 4 tokens for every context, in fractions. It
lists every draft that the draft model can draw. For each it follows a rule's definition and so divides the unit cube
of the noise into boxes on which the outcome is constant. The op is called at two opposite corners of each box, just
inside. Its tokens must agree there, and their probability is the box's volume, exact.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import product
from math import prod
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from potstill.ops.acceptance import (
    Acceptance,
    accept_chain,
    accept_greedy,
    accept_tree,
    accept_typical,
    acceptance_rate,
    best_draft_length,
    chain_parents,
    compute_mean_tokens,
    compute_mean_tokens_by_position,
    compute_operation_factor,
    count_passes,
    find_equal_rate,
    list_depths,
    residual,
    speed_up,
    typical_threshold,
    unfold_matches,
)

Law = tuple[Fraction, ...]
Interval = tuple[Fraction, Fraction]
EDGE = Fraction(1, 10**9)
RULES = ("chain", "distinct", "independent", "chosen")


class Box(NamedTuple):
    """Noise intervals by name, `("coin", depth, k)` or `("draw", depth)`; noise without a name is not read."""

    intervals: dict[tuple[object, ...], Interval]

    def volume(self) -> Fraction:
        volume = Fraction(1)
        for low, high in self.intervals.values():
            volume *= high - low
        return volume

    def within(self, name: tuple[object, ...], low: Fraction, high: Fraction) -> "Box":
        return Box({**self.intervals, name: (low, high)})


class Language:
    """A random table of p and q for every context, with zeros and equal rows among them."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.vocabulary = vocabulary
        self.generator = torch.Generator().manual_seed(seed)
        self.tables: dict[tuple[str, tuple[int, ...]], Law] = {}

    def law(self, model: str, context: tuple[int, ...]) -> Law:
        key = (model, context)
        if key not in self.tables:
            weights = torch.randint(0, 5, (self.vocabulary,), generator=self.generator).tolist()
            weights[int(torch.randint(0, self.vocabulary, (1,), generator=self.generator))] += 1
            self.tables[key] = tuple(Fraction(w, sum(weights)) for w in weights)
        return self.tables[key]


def normalize(weights: Sequence[Fraction]) -> Law:
    total = sum(weights)
    return tuple(w / total for w in weights) if total else tuple(weights)


def without(law: Law, token: int) -> Law:
    return normalize([Fraction(0) if v == token else x for v, x in enumerate(law)])


def left_over(p: Law, q: Law) -> Law:
    return normalize([max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)])


class Tree(NamedTuple):
    tokens: list[int]
    parents: list[int]
    contexts: list[tuple[int, ...]]  # of each token, its own left out


def draft_trees(
    language: Language, widths: Sequence[int], draw: str, contexts: Sequence[tuple[int, tuple[int, ...]]] | None = None
) -> Iterator[tuple[Fraction, Tree]]:
    """Every draft tree of these widths by depth, with its probability."""
    nodes = contexts if contexts is not None else [(-1, ())]
    if not widths:
        yield Fraction(1), Tree([], [], [])
        return
    options = [list(sibling_draws(language.law("q", context), widths[0], draw)) for _, context in nodes]
    first = 0 if contexts is None else nodes[-1][0] + 1
    for choice in product(*options):
        probability, tree, later = Fraction(1), Tree([], [], []), []
        for (parent, context), (weight, siblings) in zip(nodes, choice, strict=True):
            probability *= weight
            for token in siblings:
                later.append((first + len(tree.tokens), (*context, token)))
                tree.tokens.append(token)
                tree.parents.append(parent)
                tree.contexts.append(context)
        if not later:
            yield probability, tree
            continue
        for weight, rest in draft_trees(language, widths[1:], draw, later):
            yield probability * weight, Tree(*(a + b for a, b in zip(tree, rest, strict=True)))


def sibling_draws(q: Law, width: int, draw: str) -> Iterator[tuple[Fraction, tuple[int, ...]]]:
    """Every draw of siblings: independent, distinct, or the likeliest ones as a fixed choice."""
    if draw == "chosen":
        yield Fraction(1), tuple(sorted(range(len(q)), key=lambda v: (-q[v], v))[:width])
        return
    for siblings in product(range(len(q)), repeat=min(width, sum(x > 0 for x in q)) if draw == "distinct" else width):
        probability, remaining = Fraction(1), q
        for token in siblings:
            probability *= remaining[token]
            remaining = without(remaining, token) if draw == "distinct" else remaining
        if probability:
            yield probability, siblings


def boxes(
    language: Language, tree: Tree, draw: str, node: int = -1, depth: int = 0, box: Box | None = None
) -> Iterator[Box]:
    """The noise boxes of the definition of a rule, on one draft."""
    box = box or Box({})
    context = (*tree.contexts[node], tree.tokens[node]) if node >= 0 else ()
    p, q = language.law("p", context), language.law("q", context)
    children = [i for i, parent in enumerate(tree.parents) if parent == node]
    if draw == "chosen":
        for token, interval in draw_intervals(p):
            child = next((i for i in children if tree.tokens[i] == token), None)
            inside = box.within(("draw", depth), *interval)
            yield from [inside] if child is None else boxes(language, tree, draw, child, depth + 1, inside)
        return
    for k, child in enumerate(children):
        token = tree.tokens[child]
        threshold = min(Fraction(1), p[token] / q[token]) if q[token] else Fraction(1 if p[token] else 0)
        if threshold:
            yield from boxes(
                language, tree, draw, child, depth + 1, box.within(("coin", depth, k), Fraction(0), threshold)
            )
        if threshold == 1:
            return
        box = box.within(("coin", depth, k), threshold, Fraction(1))
        p = left_over(p, q)
        q = without(q, token) if draw == "distinct" else q
    yield from (box.within(("draw", depth), *interval) for _, interval in draw_intervals(p))


def draw_intervals(p: Law) -> Iterator[tuple[int, Interval]]:
    low = Fraction(0)
    for token, x in enumerate(p):
        if x:
            yield token, (low, low + x)
        low += x


def corners(box: Box, depth: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(draws, coins) just inside the lowest and the highest corner of a box; noise that is not read is 0.5."""
    for highest in (False, True):
        draws = torch.full((depth + 1,), 0.5, dtype=torch.float64)
        coins = torch.full((depth + 1, width), 0.5, dtype=torch.float64)
        for (kind, *index), (low, high) in box.intervals.items():
            value = float(high - EDGE if highest else low + EDGE)
            (coins if kind == "coin" else draws)[tuple(index)] = value  # type: ignore[index]
        yield draws, coins


def tensor(laws: Sequence[Law]) -> Tensor:
    return torch.tensor([[float(x) for x in law] for law in laws], dtype=torch.float64)


def accept(rule: str, p: Tensor, q: Tensor, tree: Tree, draws: Tensor, coins: Tensor) -> Acceptance:
    if rule == "chain":
        return accept_chain(p, q, tree.tokens, draws=draws, coins=coins[: len(tree.tokens), 0])
    return accept_tree(
        p,
        None if rule == "chosen" else q,
        tree.tokens,
        tree.parents,
        draws=draws,
        coins=coins,
        replacement=rule == "independent",
    )


def output_law(language: Language, widths: Sequence[int], draw: str, rule: str) -> dict[tuple[int, ...], Fraction]:
    """The law of the first tokens that `rule` writes from drafts by `draw`: one more than the tree is deep.

    Where the rule writes fewer, the target's own law continues.
    """
    law: Counter[tuple[int, ...]] = Counter()
    for probability, tree in draft_trees(language, widths, draw):
        contexts = [(), *((*c, t) for c, t in zip(tree.contexts, tree.tokens, strict=True))]
        p = tensor([language.law("p", context) for context in contexts])
        q = tensor([language.law("q", context) for context in tree.contexts] or [language.law("q", ())])
        covered = Fraction(0)
        for box in boxes(language, tree, "distinct" if rule == "chain" else rule):
            found = {tuple(write(rule, p, q, tree, *corner)) for corner in corners(box, len(widths), max(widths))}
            assert len(found) == 1, "the noise box has two outcomes"
            covered += box.volume()
            for text, weight in continuations(language, found.pop(), len(widths) + 1):
                law[text] += probability * box.volume() * weight
        assert covered == 1
    return {text: weight for text, weight in law.items() if weight}


def write(rule: str, p: Tensor, q: Tensor, tree: Tree, draws: Tensor, coins: Tensor) -> list[int]:
    path, token = accept(rule, p, q, tree, draws, coins)
    assert [tree.parents[i] for i in path] == [-1, *path][: len(path)]
    return [*(tree.tokens[i] for i in path), token]


def continuations(language: Language, text: tuple[int, ...], length: int) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    if len(text) == length:
        yield text, Fraction(1)
        return
    for token, x in enumerate(language.law("p", text)):
        if x:
            for longer, weight in continuations(language, (*text, token), length):
                yield longer, x * weight


SMALL_TREES = [(3, (2,)), (3, (3,)), (3, (2, 1)), (3, (1, 2)), (4, (2,)), (4, (3,))]
CASES = [
    *((rule, vocabulary, (1,) * length) for rule in RULES for vocabulary, length in ((3, 1), (3, 2), (3, 3), (4, 2))),
    *((rule, vocabulary, widths) for rule in RULES if rule != "chain" for vocabulary, widths in SMALL_TREES),
    *(("chosen", vocabulary, widths) for vocabulary in (3, 4) for widths in ((2, 2), (3, 2, 1))),
]


@pytest.mark.parametrize(("rule", "vocabulary", "widths"), CASES)
def test_every_rule_leaves_the_law_of_the_target(rule: str, vocabulary: int, widths: tuple[int, ...]) -> None:
    for seed in range(1 if len(widths) > 1 and max(widths) > 1 else 2):
        language = Language(vocabulary, seed)
        law = output_law(language, widths, "distinct" if rule == "chain" else rule, rule)
        assert law == dict(continuations(language, (), len(widths) + 1))


def test_the_enumeration_sees_independent_siblings_under_the_rule_of_distinct_ones() -> None:
    languages = [Language(3, seed) for seed in range(4)]
    laws = [output_law(language, (2,), "independent", "distinct") for language in languages]
    assert laws != [dict(continuations(language, (), 2)) for language in languages]


def test_a_chain_is_a_tree() -> None:
    tokens, parents = [1, 0, 2], chain_parents(3)
    p, q = torch.rand(4, 3, dtype=torch.float64).softmax(-1), torch.rand(3, 3, dtype=torch.float64).softmax(-1)
    for _ in range(50):
        draws, coins = torch.rand(4, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
        chain = accept_chain(p, q, tokens, draws=draws, coins=coins[:3, 0])
        for replacement in (False, True):
            assert accept_tree(p, q, tokens, parents, draws=draws, coins=coins, replacement=replacement) == chain


def test_greedy_keeps_the_longest_path_that_the_target_writes_itself() -> None:
    tokens, parents = [5, 7, 7, 8, 9, 8], [-1, -1, 0, 1, 3, 2]
    assert list_depths(parents) == [0, 0, 1, 1, 2, 2]
    choices = torch.tensor([7, 0, 8, 0, 9, 3, 0])
    assert accept_greedy(choices, tokens, parents) == ([1, 3, 4], 3)
    assert accept_greedy(torch.tensor([4, 0, 8, 0, 9, 3, 0]), tokens, parents) == ([], 4)
    assert accept_greedy(torch.tensor([4]), [], []) == ([], 4)


def test_golden_numbers_of_a_sampled_token() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert (p / q).clamp(max=1).tolist() == pytest.approx([1, 0.6, 0.6667], abs=1e-4)
    assert acceptance_rate(p, q).item() == pytest.approx(0.7)
    assert residual(p, q).tolist() == pytest.approx([1, 0, 0])
    for token, threshold in ((1, 0.6), (2, 2 / 3)):
        for coin, path in ((threshold - 1e-9, [0]), (threshold + 1e-9, [])):
            rows = torch.stack([p, q])
            coins, draws = torch.tensor([coin], dtype=torch.float64), torch.tensor([0.99, 0.0], dtype=torch.float64)
            found = accept_chain(rows, q[None], [token], draws=draws, coins=coins)
            assert found == (path, 0)


def test_golden_numbers_of_chosen_tokens() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64)
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    draws = [torch.stack([u, torch.tensor(0.0, dtype=torch.float64)]) for u in grid]
    found = [accept_tree(p, None, [1, 0], [-1, -1], draws=d, coins=d[:, None]) for d in draws]
    first, second = [path for path, _ in found].count([0]), [path for path, _ in found].count([1])
    assert first == 300
    assert second / (1000 - first) == pytest.approx(0.714286, abs=1e-6)
    assert {token for path, token in found if not path} == {2}


def test_nothing_remains_of_equal_distributions_so_the_residual_is_the_target() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert residual(p, p).tolist() == p.tolist()
    coins, draws = torch.tensor([1 - 1e-12], dtype=torch.float64), torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert accept_chain(torch.stack([p, p]), p[None], [2], draws=draws, coins=coins) == ([0], 2)


def test_a_token_that_the_target_excludes_is_never_kept() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    assert accept_chain(p, q, [1], draws=zeros[:, 0], coins=zeros[:1, 0]) == ([], 0)
    assert accept_tree(p, q, [1], [-1], draws=zeros[:, 0], coins=zeros) == ([], 0)


def test_typical_acceptance_has_medusas_thresholds() -> None:
    p = torch.tensor([[0.6, 0.25, 0.1, 0.05]], dtype=torch.float64)
    assert -torch.xlogy(p, p).sum().item() == pytest.approx(1.0331, abs=1e-4)
    assert typical_threshold(p).item() == pytest.approx(0.09)
    assert typical_threshold(torch.full((1, 100), 0.01, dtype=torch.float64)).item() == pytest.approx(0.003)


def test_typical_acceptance_keeps_the_longest_path_and_of_two_the_likelier() -> None:
    row = [0.6, 0.25, 0.1, 0.05]
    p = torch.tensor([row] * 7, dtype=torch.float64)
    draws = torch.tensor([0.0, 0.0, 0.9], dtype=torch.float64)
    # paths: 3 (too unlikely) and a child; 0; 1 with 2; 0 with 1
    tokens, parents = [3, 0, 0, 1, 2, 1], [-1, 0, -1, -1, 3, 2]
    assert accept_typical(p, tokens, parents, draws=draws) == ([2, 5], 2)
    assert accept_typical(p[:1], [], [], draws=draws) == ([], 0)


@pytest.mark.parametrize(
    ("alpha", "cost", "length", "ratio", "tokens"),
    [
        (0.6, 0.05, 4, 1.921, 2.306),
        (0.8, 0.05, 8, 3.092, 4.329),
        (0.8, 0.2, 4, 1.868, 3.362),
        (0.9, 0.02, 15, 6.267, 8.147),
    ],
)
def test_golden_speed_ups(alpha: float, cost: float, length: int, ratio: float, tokens: float) -> None:
    assert best_draft_length(alpha, cost, longest=15) == length
    assert speed_up(alpha, length, cost) == pytest.approx(ratio, abs=1e-3)
    assert compute_mean_tokens(alpha, length) == pytest.approx(tokens, abs=1e-3)


def test_more_golden_speed_ups() -> None:
    assert speed_up(0.8, 4, 0.05) == pytest.approx(2.801, abs=1e-3)
    assert compute_mean_tokens(0.7, 4) == pytest.approx(2.7731, abs=1e-4)
    assert compute_mean_tokens(1.0, 4) == 5
    assert speed_up(0.7, 4, 0.1, verify_cost=1.2) == pytest.approx(2.7731 / 1.6, abs=1e-4)


@pytest.mark.parametrize(("alpha", "cost", "pays"), [(0.3, 0.3, False), (0.3, 0.31, False), (0.3, 0.29, True)])
def test_a_draft_pays_if_and_only_if_its_acceptance_exceeds_its_cost(alpha: float, cost: float, pays: bool) -> None:
    assert (best_draft_length(alpha, cost) > 0) == pays


def test_a_draft_of_constant_acceptance_writes_the_expected_number_of_tokens() -> None:
    alpha, length, passes = 0.7, 4, 1000
    p = torch.tensor([[alpha, 1 - alpha, 0.0]] * (length + 1), dtype=torch.float64)
    q = torch.tensor([[1.0, 0.0, 0.0]] * length, dtype=torch.float64)
    draws, coins = torch.rand(passes, length + 1, dtype=torch.float64), torch.rand(passes, length, dtype=torch.float64)
    counts = torch.tensor(
        [len(accept_chain(p, q, [0] * length, draws=u, coins=c).path) + 1.0 for u, c in zip(draws, coins, strict=True)]
    )
    standard_error = counts.std() / passes**0.5
    assert abs(counts.mean() - compute_mean_tokens(alpha, length)) < 4 * standard_error


def test_the_passes_of_a_draft_follow_from_its_matches() -> None:
    agreement = torch.tensor([True, True, False, True, True, True, False])
    matches = unfold_matches(agreement, 3)
    assert matches.shape == (7, 3)
    assert matches[0].tolist() == [True, True, False]
    assert matches[5].tolist() == [True, False, False]
    assert matches[6].tolist() == [False, False, False]
    # length 0: one token a pass; 1: 2 + 1 + 2 + 2; 2: 3 + 3 + 1; 3: 3 + 4
    assert [count_passes(matches, length) for length in range(4)] == [7, 4, 3, 2]


def test_places_behind_a_wrong_one_do_not_count() -> None:
    assert count_passes(torch.tensor([[False, True], [True, False], [False, True]]), 2) == 2


def test_tokens_per_pass_by_position_are_those_of_every_outcome() -> None:
    rates = [0.6, 0.9, 0.0, 0.5]
    for length in range(len(rates) + 1):
        expected = 0.0
        for kept in product([True, False], repeat=length):
            probability = prod(rate if k else 1 - rate for rate, k in zip(rates, kept, strict=False))
            expected += probability * (1 + [*kept, False].index(False))
        assert compute_mean_tokens_by_position(rates[:length]) == pytest.approx(expected)
    assert compute_mean_tokens_by_position([0.7] * 4) == pytest.approx(compute_mean_tokens(0.7, 4))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_equal_rates_are_their_own_alpha(alpha: float) -> None:
    assert find_equal_rate([alpha] * 5) == pytest.approx(alpha)


def test_alpha_is_the_kept_tokens_over_the_tried_ones() -> None:
    # of 100 drafts 80 keep the first token, 40 of those the second: 120 kept of 180 tried
    assert find_equal_rate([0.8, 0.5]) == pytest.approx(120 / 180)
    assert find_equal_rate([]) == 0.0


def test_speculation_costs_operations_that_rejected_tokens_waste() -> None:
    assert compute_operation_factor(1.0, 4, 0.0) == 1.0
    assert compute_operation_factor(0.7, 4, 0.1) == pytest.approx((0.4 + 5) / 2.7731, abs=1e-4)
    assert compute_operation_factor(0.7, 4, 0.1) == pytest.approx((1 - 0.7) * (4 * 0.1 + 4 + 1) / (1 - 0.7**5))
