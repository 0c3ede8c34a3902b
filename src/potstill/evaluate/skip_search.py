"""Searches the layers that a model skips to draft for itself.

    speed-up(S) = max_g E(g, S) / (g c(S) + v(g))

E is the number of tokens per pass, with the drafts of the model without the layers S, along the model's own text. c is
the cost of a step without them, and v that of verifying g tokens.

The search grows S by the layer whose loss costs the least agreement. A layer's agreement falls as others go, so a
value from a smaller S bounds it, and few layers are tried again. It ends where the agreement is below the cost of a
step without any layer, where no larger S can pay. Then it toggles each layer once around the best S.

Source: Zhang et al., "Draft & Verify" (arXiv:2309.08168), section 3.2, which skips attention and feed-forward parts of
their own, by Bayesian optimization of the measured time per token. The bounds are those of Minoux (1978), "Accelerated
Greedy Algorithms for Maximizing Submodular Set Functions".
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from potstill.evaluate.draft_matches import DraftMatches
from potstill.evaluate.pass_times import PassCosts

TRIES = 3  # layers that are measured anew in one step, at most

Match = Callable[[frozenset[int]], DraftMatches]


@dataclass(frozen=True, kw_only=True)
class SkipCosts:
    """The costs of drafts without some layers: a step without any layer costs `base`, and all layers cost alike."""

    num_layers: int
    base: float
    verify: Mapping[int, float]

    def count(self, num_skipped: int) -> PassCosts:
        """The costs of a draft that skips this many layers."""
        share = 1 - num_skipped / self.num_layers
        return PassCosts(draft=self.base + (1 - self.base) * share, verify=self.verify)


@dataclass(frozen=True, kw_only=True)
class SkipSet:
    """Layers to skip, with what the draft without them reaches at its best length."""

    layers: tuple[int, ...]
    matches: DraftMatches
    costs: PassCosts

    @property
    def agreement(self) -> float:
        """The share of tokens that the draft predicts as the model does."""
        return self.matches.shares[0]

    @property
    def draft_length(self) -> int:
        """The length of the largest predicted speed-up."""
        return max(self.costs.verify, key=self.predict)

    @property
    def speed_up(self) -> float:
        """The speed-up that is predicted at the best length."""
        return self.predict(self.draft_length)

    def predict(self, draft_length: int) -> float:
        """The predicted speed-up at a length."""
        return self.costs.predict(self.matches.mean_tokens(draft_length), draft_length)


class SkipSearch:
    """The sets that were measured by `match`, at most `max_evaluations` of them."""

    def __init__(
        self, match: Match, costs: SkipCosts, *, max_evaluations: int, report: Callable[[], object] = lambda: None
    ) -> None:
        self.match, self.costs, self.max_evaluations, self.report = match, costs, max_evaluations, report
        self.sets: dict[frozenset[int], SkipSet] = {}

    def run(self) -> SkipSet:
        """The set of the largest predicted speed-up."""
        self._grow()
        self._toggle()
        return self.best

    @property
    def best(self) -> SkipSet:
        """The best of the sets that were measured; of equal ones the smallest."""
        return max(self.sets.values(), key=lambda skip_set: (skip_set.speed_up, -len(skip_set.layers)))

    @property
    def _is_exhausted(self) -> bool:
        return len(self.sets) >= self.max_evaluations

    def _measure(self, layers: Iterable[int]) -> SkipSet:
        key = frozenset(layers)
        if key not in self.sets:
            self.report()
            costs = self.costs.count(len(key))
            self.sets[key] = SkipSet(layers=tuple(sorted(key)), matches=self.match(key), costs=costs)
        return self.sets[key]

    def _grow(self) -> None:
        bounds = dict.fromkeys(range(self.costs.num_layers), 1.0)
        skipped: frozenset[int] = frozenset()
        tries = self.costs.num_layers  # the first step measures every layer
        while len(bounds) > 1 and not self._is_exhausted:
            layer = self._choose_layer(skipped, bounds, tries)
            skipped, tries = skipped | {layer}, TRIES
            del bounds[layer]
            if self._measure(skipped).agreement < self.costs.base:
                return

    def _choose_layer(self, skipped: frozenset[int], bounds: dict[int, float], tries: int) -> int:
        """The next layer to skip; renews the bounds of those that it measures."""
        agreements: dict[int, float] = {}
        while len(agreements) < min(tries, len(bounds)) and not (agreements and self._is_exhausted):
            stale = {layer: bound for layer, bound in bounds.items() if layer not in agreements}
            candidate = max(stale, key=lambda layer: (stale[layer], layer))
            if agreements and max(agreements.values()) >= stale[candidate]:
                break
            agreements[candidate] = bounds[candidate] = self._measure(skipped | {candidate}).agreement
        return max(agreements, key=lambda layer: (agreements[layer], layer))

    def _toggle(self) -> None:
        """Adds or drops each layer once where that is better; one layer at least is skipped, and one stays."""
        for layer in range(self.costs.num_layers):
            if self._is_exhausted:
                return
            layers = frozenset(self.best.layers) ^ {layer}
            if 0 < len(layers) < self.costs.num_layers:
                self._measure(layers)


def format_layers(layers: Iterable[int]) -> str:
    """`3,5-8` for the layers 3, 5, 6, 7 and 8, as `--draft skip:LAYERS` reads them."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
