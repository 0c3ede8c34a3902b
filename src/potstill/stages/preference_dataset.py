"""The preferences of a stage: packs of pairs, or of answers with labels, to train on and to measure on.

No prompt is both trained on and measured on. What the packs hold and their order follow from the data, the tokenizer,
the context and the seed alone. So a cache of a reference's log-probabilities fits, and changes no shuffle.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.counts import count_noun
from potstill.core.errors import DataError
from potstill.core.screen import status
from potstill.data.corpus import HELD_OUT_DUPLICATE, Corpus, remove_held_out
from potstill.data.packing import Packs, pack
from potstill.data.preference_tokens import (
    TOO_LONG,
    GroupKind,
    PreferenceCounts,
    TokenizedPreferences,
    tokenize_preferences,
)
from potstill.data.preferences import load_preferences
from potstill.data.row_reader import BAD_ROW
from potstill.data.tokenize import TEMPLATE_REFUSAL
from potstill.data.windows import COVERED_PERCENTILE
from potstill.evaluate.scoring_windows import check_context
from potstill.stages.console import print_note, print_warning
from potstill.stages.corpus import load_data
from potstill.stages.dataset import load_held_out_corpus
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.reading_report import build_corpus_facts, report_reading
from potstill.stages.text_options import make_rendering

HELD_OUT_GROUPS = 200  # pairs, or answers with labels, to measure on
WARNED_SHARE = 0.05  # of the groups; if more are too long, a warning advises a larger context


@dataclass(frozen=True, kw_only=True)
class PreparedPreferences:
    """Packs to train on and to measure on, a digest of both, the facts for the card, and the counts of either split."""

    packs: Packs
    validation_packs: Packs
    digest: str
    facts: Mapping[str, Any]
    counts: PreferenceCounts
    validation_counts: PreferenceCounts


@status("reading the preferences")
def prepare_preferences(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: GroupKind = "preferences",
    models: Sequence[PreTrainedModel] = (),
    groups: int = HELD_OUT_GROUPS,
    shared: bool = True,
) -> PreparedPreferences:
    """Reads and packs preferences; a pair, or an answer with its baseline, is a group of documents of one pack.

    `data` is what the objective trains on: `preferences`, `labels` (KTO), or the `chosen` answers alone, which are
    measured on pairs. At most `groups` of the held-out ones are measured. Without `shared`, each answer repeats its
    prompt.

    Raises:
        DataError, NotFound: as `load_preferences` and `tokenize_preferences` do; labels that are all alike.
        UsageError: a context longer than one of `models` can read.
    """
    check_context(config.context, *models)
    corpus = load_data(config, label=config.label, load=load_preferences)
    held_out = load_held_out_corpus(config, load=load_preferences)
    corpus = remove_held_out(corpus, held_out.documents)

    def tokenize(part: Corpus, kind: GroupKind, limit: int | None) -> TokenizedPreferences:
        options: dict[str, Any] = {"rendering": make_rendering(config), "length": config.context, "shared": shared}
        return tokenize_preferences(part, tokenizer, data=kind, limit=limit, **options)

    validation_data: GroupKind = "preferences" if data == "chosen" else data
    training, validation = tokenize(corpus, data, None), tokenize(held_out, validation_data, groups)
    if data == "labels":
        _check_labels(corpus, training.counts)
    packs, validation_packs = (
        pack(part.tokens, length=config.context, seed=config.seed) for part in (training, validation)
    )
    report_reading(corpus, packs, training.tokens.report)
    _report_counts(corpus, training.counts, config.context)
    facts = {
        **build_corpus_facts(corpus, packs, training.tokens.report),
        "preferences": training.counts.to_dict(),
        "held_out_preferences": validation.counts.to_dict(),
        "measured_on": f"{held_out.name} ({held_out.provenance.get('split', 'all')}), "
        f"{count_noun(validation.counts.groups, _NOUNS[validation_data])}",
        "measured_digest": held_out.digest,
    }
    digest = hashlib.sha256(f"{packs.digest} {validation_packs.digest}".encode()).hexdigest()
    return PreparedPreferences(
        packs=packs,
        validation_packs=validation_packs,
        digest=digest,
        facts=facts,
        counts=training.counts,
        validation_counts=validation.counts,
    )


_NOUNS: Mapping[GroupKind, str] = {"preferences": "pair", "labels": "answer"}


def _check_labels(corpus: Corpus, counts: PreferenceCounts) -> None:
    """Raises: DataError if all answers are on one side."""
    if not (counts.chosen and counts.rejected):
        label = "desirable" if counts.chosen else "undesirable"
        raise DataError(
            f"all {counts.groups} answers of {corpus.name} are {label}, and KTO learns from the difference; add "
            f"answers with the other label"
        )


def _report_counts(corpus: Corpus, counts: PreferenceCounts, context: int) -> None:
    """Print what is left out, and how long the answers of either side are."""
    reported_reasons = (HELD_OUT_DUPLICATE, BAD_ROW, TEMPLATE_REFUSAL)  # by `report_reading`
    if reasons := [f"{n:,} with {reason}" for reason, n in counts.left_out.items() if reason not in reported_reasons]:
        print_note(f"{corpus.name}: left out {', '.join(reasons)}")
    if (num_long := counts.left_out.get(TOO_LONG, 0)) > WARNED_SHARE * (counts.groups + num_long):
        print_warning(
            f"{corpus.name}: {num_long / (counts.groups + num_long):.0%} do not fit into --context {context}; "
            f"--context {counts.covering} holds {COVERED_PERCENTILE} % of them"
        )
    shorter = counts.shorter_is_chosen
    note = "" if shorter is None else f"; the shorter answer is chosen in {shorter:.1%} of the pairs that differ"
    if counts.chosen and counts.rejected:
        print_note(
            f"{corpus.name}: chosen answers have {counts.chosen_tokens:,.0f} tokens and rejected ones "
            f"{counts.rejected_tokens:,.0f}, on average{note}"
        )
