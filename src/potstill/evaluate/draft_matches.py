"""Where a greedy draft agrees with its target, measured in one pass over the target's own text.

A draft token counts only if all draft tokens before it are right. A draft model has then read the target's own text, so
one pass over that text gives what every draft would propose, for every draft length (`ops.acceptance.count_passes`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES
from potstill.core.types import IGNORE, Head, Needs, Signals, supervised_positions
from potstill.decode.drafters.medusa import MedusaHeads
from potstill.evaluate.bootstrap import measure_ratio
from potstill.evaluate.scoring_windows import Row, ScoringConfig, build_packs
from potstill.models.inference import inference_context
from potstill.models.signals import compute_signals, get_head
from potstill.ops.acceptance import count_passes, unfold_matches

Predict = Callable[[Signals], Int[Tensor, "N K"]]


@dataclass(frozen=True)
class DraftMatches:
    """For each text `matches` [T K] as `count_passes` takes them: place k of the draft behind token t is right."""

    texts: Sequence[Bool[Tensor, "_ K"]]

    @property
    def longest(self) -> int:
        """The longest draft that the matches describe."""
        return self.texts[0].shape[1]

    @property
    def shares(self) -> list[float]:
        """For each place of a draft, the share of right tokens, where the text still has a token there."""
        pairs = [self._count_place(place) for place in range(self.longest)]
        return [right / max(total, 1) for right, total in pairs]

    def mean_tokens(self, draft_length: int) -> float:
        """Tokens per pass of the target, with drafts of this length; 1 without drafts."""
        tokens = sum(len(matches) for matches in self.texts)
        return tokens / sum(count_passes(matches, draft_length) for matches in self.texts)

    def measure(self, draft_length: int) -> list[Measure]:
        """`acceptance` of the first draft token, with its interval over texts, and `tokens_per_pass`."""
        right = np.array([float(matches[:, 0].sum()) for matches in self.texts])
        totals = np.array([float(len(matches)) for matches in self.texts])
        note = f"greedy, first draft token, on {int(totals.sum()):,} tokens of the target itself; interval over texts"
        acceptance = measure_ratio("acceptance", right, totals, note=note)
        tokens = MEASURES["tokens_per_pass"].build(
            self.mean_tokens(draft_length), len(totals), note=f"greedy, drafts of {draft_length} tokens"
        )
        return [acceptance, tokens]

    def _count_place(self, place: int) -> tuple[int, int]:
        """The right tokens at a place of the draft, and all."""
        return (
            sum(int(matches[:, place].sum()) for matches in self.texts),
            sum(max(0, len(matches) - place) for matches in self.texts),
        )


def match_model(
    draft: PreTrainedModel,
    rows: Sequence[Row],
    config: ScoringConfig,
    *,
    longest: int,
    reference: Sequence[Int[Tensor, " _"]] | None = None,
) -> DraftMatches:
    """The matches of a draft model, for drafts of at most `longest` tokens.

    `rows` are texts of the target (`target_text.write_target_rows`), each in one window of `config`. `reference` are
    the target's own predictions there (`predict_rows`). They differ from the text where the target's rounding in one
    pass differs from that in single steps. Without it the text itself is the reference.
    """
    predictions = predict_rows(draft, rows, config)
    if reference is None:
        reference = [torch.tensor([label for label in row.labels if label != IGNORE]) for row in rows]
    agreements = [(drafts == tokens)[1:] for drafts, tokens in zip(predictions, reference, strict=True)]
    return DraftMatches([unfold_matches(agreement, longest) for agreement in agreements])


def predict_rows(model: PreTrainedModel, rows: Sequence[Row], config: ScoringConfig) -> list[Int[Tensor, " _"]]:
    """The token that a model would write at each labeled token of each row, from the tokens before it."""
    return [predictions[:, 0] for predictions, _ in _predict(model, rows, config, _predict_next)]


def match_heads(
    heads: MedusaHeads, target: PreTrainedModel, rows: Sequence[Row], config: ScoringConfig
) -> DraftMatches:
    """The matches of Medusa heads on their target; the k-th head drafts place k."""
    head = get_head(target)
    head = head if config.vocabulary is None else head.crop_vocabulary(config.vocabulary)
    texts = []
    for predictions, tokens in _predict(target, rows, config, lambda signals: _predict_places(heads, head, signals)):
        futures = torch.cat([tokens[1:], tokens.new_full((predictions.shape[1],), -1)])
        texts.append((predictions == futures.unfold(0, predictions.shape[1], 1))[: len(tokens) - 1])
    return DraftMatches(texts)


def _predict_next(signals: Signals) -> Int[Tensor, "N 1"]:
    return signals.logits(signals.rows).argmax(-1, keepdim=True)


def _predict_places(heads: MedusaHeads, head: Head, signals: Signals) -> Int[Tensor, "N K"]:
    return torch.stack([head.logits(states).argmax(-1) for states in heads(signals.rows)], -1)


def _predict(
    model: PreTrainedModel, rows: Sequence[Row], config: ScoringConfig, predict: Predict
) -> Iterator[tuple[Int[Tensor, "T K"], Int[Tensor, " T"]]]:
    """(predictions, tokens) of the labeled tokens of each row, on the CPU, in the order of the rows."""
    config, texts = config.limit_to_context(model), {}
    with inference_context(model, dtype=config.dtype):
        for batch, row_indices in build_packs(rows, config, device=model.device):
            positions, targets, documents = supervised_positions(batch)
            signals = compute_signals(model, batch, Needs(positions), vocabulary=config.vocabulary)
            parts = [predict(Signals(part, signals.logits)).cpu() for part in signals.rows.split(config.chunk)]
            predictions = torch.cat(parts)
            for number, row in enumerate(row_indices.tolist()):
                is_in_row = (documents == number).cpu()
                texts[row] = (predictions[is_in_row], targets.cpu()[is_in_row])
    yield from (texts[row] for row in range(len(rows)))
