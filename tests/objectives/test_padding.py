"""Every objective there is: the same documents as one pack and as padded rows are the same sums and gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from tests.objectives.crossed import TEXTS, taught
from tests.objectives.crossed import batch_of as crossed_batch
from tests.objectives.enumerated import ACROSS_METHODS as ACROSS
from tests.objectives.enumerated import ALIKE
from tests.objectives.test_across import OURS, THEIRS, pair
from tests.objectives.test_across import study_of as crossed_study
from tests.objectives.test_invariants import LENGTHS, assert_equal, batch_of, gradients
from tests.objectives.test_registry import larger, study_of
from torch import Tensor
from transformers import LlamaForCausalLM

from potstill.core.types import get_view
from potstill.models import signals as live
from potstill.objectives.model_info import PairInfo
from potstill.ops.layout import unpack
from potstill.train.training_module import TrainingModule

__all__ = ["pair"]  # the fixture


def padded(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The documents of all networks as padded rows; tables of rows stay as they are."""
    tables = {key: tensor for key, tensor in batch.items() if key.startswith("aligned.")}
    found = unpack(get_view(batch, "student")) | tables
    if "teacher.input_ids" in batch:
        found |= {f"teacher.{key}": tensor for key, tensor in unpack(get_view(batch, "teacher")).items()}
    return found


@contextmanager
def mixing(study: TrainingModule) -> Iterator[None]:
    """Networks that would mix what is packed, so that they are given padded rows and a mask."""
    models = (study.student, *study.frozen_models)
    before = [live.probe_model(model) for model in models]
    for model in models:
        live._probes[model] = live.ModelProbe(has_known_head=True, supports_packing=False, takes_position_ids=True)
    try:
        yield
    finally:
        live._probes.update(zip(models, before, strict=True))


def require_the_same(study: TrainingModule, packed: Mapping[str, Tensor]) -> None:
    """Counts, sums and gradients are those of the padded batch, and of networks that are given padded rows."""
    rows = padded(packed)
    assert (rows["documents"] < 0).any(), "the test wants padding"
    assert torch.equal(study.counts(rows), study.counts(packed))
    assert (study.counts(packed) > 0).all(), "the test wants every term"
    sums, expected = taught(study, packed)(**packed)["sums"], gradients(study, packed)
    assert any(g.abs().max() > 1e-3 for g in expected.values())
    torch.testing.assert_close(study(**rows)["sums"], sums, rtol=1e-5, atol=1e-9)
    assert_equal(gradients(study, rows), expected)
    with mixing(study):
        torch.testing.assert_close(study(**packed)["sums"], sums, rtol=1e-5, atol=1e-9)
        assert_equal(gradients(study, packed), expected)


@pytest.mark.parametrize("name", ALIKE)
def test_padding_changes_no_objective_of_one_tokenizer(name: str, tiny_llama: LlamaForCausalLM) -> None:
    study = study_of(tiny_llama.double(), larger(tiny_llama).double(), name)
    batch = batch_of(*LENGTHS)
    sampled = torch.isin(batch["documents"], torch.tensor([0, 2]))  # what MiniLLM's policy is of
    require_the_same(study, {**batch, "sampled": sampled})


@pytest.mark.parametrize("name", ACROSS)
def test_padding_changes_no_objective_between_two_tokenizers(name: str, pair: PairInfo) -> None:
    require_the_same(crossed_study(pair, name), crossed_batch(TEXTS, OURS, THEIRS))
