"""Chooses the tokens that a trained draft scores: those that its text trains most often.

Source: Zhao et al., "FR-Spec" (arXiv:2502.14856), section 3, with the counts of the training text.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from potstill.core.types import IGNORE
from potstill.data.packing import Packs
from potstill.decode.drafters.draft_vocabulary import DRAFT_VOCABULARY_FILE
from potstill.decode.stop_tokens import list_stop_tokens
from potstill.stages.console import print_note
from potstill.stages.distill.config import DistillConfig
from potstill.stages.model_pair import ModelPair


class DraftVocabulary(NamedTuple):
    """The token ids, the most frequent ones first, and the share of the trained tokens that they are."""

    token_ids: list[int]
    share: float


def choose_draft_vocabulary(packs: Packs, size: int, *, stop: Sequence[int], vocabulary: int) -> DraftVocabulary:
    """The `stop` tokens, then the tokens that are trained most often, `size` in all or as many as there are.

    Of tokens that are trained equally often, those that the whole text has more often come first, then lower ids.
    """
    num_trained = np.bincount(packs.labels[packs.labels != IGNORE], minlength=vocabulary)
    num_read = np.bincount(packs.input_ids, minlength=vocabulary)
    by_frequency = np.lexsort((-num_read, -num_trained)).tolist()
    token_ids = list(dict.fromkeys([*stop, *by_frequency]))[: max(size, len(stop))]
    return DraftVocabulary(token_ids, float(num_trained[token_ids].sum() / num_trained.sum()))


def make_draft_vocabulary(
    config: DistillConfig, pair: ModelPair, packs: Packs
) -> tuple[dict[str, Any], dict[str, str]]:
    """(facts for the card, files for the student's folder), with a note; both are empty without --draft-vocabulary."""
    if config.draft_vocabulary is None:
        return {}, {}
    stop = [token for token in list_stop_tokens(pair.origin.model, pair.origin.tokenizer) if token < pair.vocabulary]
    token_ids, share = choose_draft_vocabulary(packs, config.draft_vocabulary, stop=stop, vocabulary=pair.vocabulary)
    print_note(
        f"as a draft the student scores {len(token_ids):,} of {pair.vocabulary:,} tokens, which are {share:.1%} of the "
        f"tokens to train on"
    )
    facts = {"tokens": len(token_ids), "share": share}
    return {"draft_vocabulary": facts}, {DRAFT_VOCABULARY_FILE: json.dumps(token_ids) + "\n"}
