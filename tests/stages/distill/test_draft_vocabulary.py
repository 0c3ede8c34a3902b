"""The draft vocabulary of a run: the tokens that its text trains most often, in the file that drafts read."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from potstill.core.errors import UsageError
from potstill.core.types import IGNORE
from potstill.data.packing import pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.decode.drafters.draft_vocabulary import DRAFT_VOCABULARY_FILE
from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.runner import ModelRunner
from potstill.models.load import load_model
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.draft_vocabulary import choose_draft_vocabulary
from potstill.stages.distill.prepare import prepare
from potstill.stages.distill.run import distill
from potstill.train.config import TrainConfig

SETTINGS = TrainConfig(tokens=256, context=64, batch_tokens=128, micro_tokens=128)


def make_document(ids: list[int], trained_from: int) -> TokenizedDocument:
    labels = [IGNORE] * trained_from + ids[trained_from:]
    return TokenizedDocument(np.array(ids, np.int32), np.array(labels, np.int32))


def test_stop_tokens_then_trained_then_read_then_low_ids_are_chosen() -> None:
    documents = [make_document([8, 8, 8, 5, 6, 5], 3), make_document([7, 5, 6, 4], 1)]  # trained: 5 5 5 6 6 4
    packs = pack(documents, length=16)
    chosen = choose_draft_vocabulary(packs, 7, stop=[9], vocabulary=10)
    assert chosen.token_ids == [9, 5, 6, 4, 8, 7, 0]
    assert chosen.share == 1
    few = choose_draft_vocabulary(packs, 2, stop=[9], vocabulary=10)
    assert (few.token_ids, few.share) == ([9, 5], 0.5)
    assert choose_draft_vocabulary(packs, 1, stop=[9, 2], vocabulary=10).token_ids == [9, 2]
    assert sorted(choose_draft_vocabulary(packs, 99, stop=[9], vocabulary=10).token_ids) == list(range(10))


def test_a_trained_draft_has_its_frequent_tokens_and_drafts_with_them(
    teacher: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DistillConfig(
        teacher=str(teacher),
        student=str(teacher),
        data=str(pairs),
        objective=ObjectiveConfig(name="acceptance_nll", cross_entropy=0.0),
        settings=SETTINGS,
        dtype="float32",
        documents=2,
        draft_vocabulary=12,
        skip_doctor=True,
    )
    card = distill(config, tmp_path / "made", show=False).card
    labels = prepare(config).dataset.packs.labels.tolist()
    counts = Counter(label for label in labels if label != IGNORE)
    token_ids = json.loads((tmp_path / "made" / DRAFT_VOCABULARY_FILE).read_text())
    target = load_model(str(teacher))
    assert token_ids[0] == target.tokenizer.eos_token_id
    assert len({*token_ids}) == 12
    assert min(counts[token] for token in token_ids[1:]) >= max(
        count for token, count in counts.items() if token not in token_ids
    )
    share = sum(counts[token] for token in token_ids) / counts.total()
    assert card.data["draft_vocabulary"] == {"tokens": 12, "share": pytest.approx(share)}
    assert f"scores 12 of {target.vocabulary} tokens, which are {share:.1%}" in capsys.readouterr().err
    assert f"tokens that it drafts: 12, {share:.1%} of the trained tokens" in (tmp_path / "made/README.md").read_text()
    runner = ModelRunner(target.model, vocabulary=target.vocabulary)
    speculation = make_speculation(runner, target.tokenizer, DraftOptions(draft=str(tmp_path / "made")))
    assert speculation is not None
    assert speculation.drafter.runner.reader.token_ids.tolist() == token_ids  # type: ignore[attr-defined]


def test_a_draft_of_no_token_is_refused() -> None:
    with pytest.raises(UsageError, match="draft_vocabulary is 0; give the number of tokens"):
        DistillConfig(teacher="smollm2", keep=0.5, draft_vocabulary=0)
