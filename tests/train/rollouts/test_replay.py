"""DistiLLM's rollouts: when the share grows, what is replayed, and that all of it is in the checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.rollouts.test_on_policy import AUTHOR, asked_packs, batch_of
from tests.train.small import assert_same_bits, settings, study_of
from transformers import LlamaForCausalLM

from potstill.train.rollouts.base import make_generator, split_documents
from potstill.train.rollouts.replay import AdaptiveRollout
from potstill.train.run import read_run_metrics, train
from potstill.train.training_module import TrainingModule


def texts(batch: Any, *, sampled: bool) -> list[tuple[int, ...]]:
    """The documents of a batch that were sampled, or those that were not."""
    owners = torch.bincount(batch["documents"][0], weights=batch["sampled"][0].double()) > 0
    documents = zip(split_documents(batch), owners.tolist(), strict=True)
    return [tuple(one.input_ids.tolist()) for one, own in documents if own is sampled]


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        pytest.param([2.0], 0.0, id="one alone says nothing"),
        pytest.param([2.0, 1.5, 1.55], 0.0, id="a little worse is not worse"),
        pytest.param([2.0, 2.1], 0.1, id="worse"),
        pytest.param([2.0, 2.2, 2.1, 2.3], 0.2, id="each time that it is worse than the one before"),
        pytest.param([float(n) for n in range(15)], 1.0, id="it ends at one"),
    ],
)
def test_the_share_grows_when_an_evaluation_is_worse_than_the_one_before(losses: list[float], share: float) -> None:
    rollout = AdaptiveRollout(AUTHOR, total_passes=10)
    for loss in losses:
        rollout.on_evaluate(loss)
    assert rollout.share == pytest.approx(share)


def test_at_the_beginning_all_is_written_anew_and_at_the_end_all_is_replayed(tiny_llama: LlamaForCausalLM) -> None:
    rollout, batch = AdaptiveRollout(AUTHOR, total_passes=2, share=1.0), batch_of(asked_packs(), 0, 1)
    first = rollout(batch, tiny_llama, {}, make_generator(1, 0, 0))
    kept = texts(first, sampled=True)
    assert [tuple(one.input_ids.tolist()) for one in rollout.buffer] == kept
    assert len(kept) == rollout.tally["documents"] == len(split_documents(batch))
    rollout.num_passes_done = 2
    last = rollout(batch, tiny_llama, {}, make_generator(1, 1, 0))
    assert set(texts(last, sampled=True)) <= set(kept)
    assert rollout.tally["replayed"] == len(kept)
    assert len(rollout.buffer) == len(kept)


def test_the_oldest_leave_a_full_buffer_first(tiny_llama: LlamaForCausalLM) -> None:
    rollout, batch = AdaptiveRollout(AUTHOR, total_passes=9, share=1.0, buffer_size=3), batch_of(asked_packs(), 0, 1)
    rolled = rollout(batch, tiny_llama, {}, make_generator(1, 0, 0))
    assert [tuple(one.input_ids.tolist()) for one in rollout.buffer] == texts(rolled, sampled=True)[-3:]


def test_with_a_share_of_zero_nothing_is_written(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_of(asked_packs(), 0, 1)
    assert AdaptiveRollout(AUTHOR, total_passes=9)(batch, tiny_llama, {}, make_generator(1, 0, 0)) is batch


@pytest.mark.parametrize("routed", [False, True])
def test_what_was_remembered_is_remembered_again(routed: bool, tiny_llama: LlamaForCausalLM) -> None:
    rollout, again = AdaptiveRollout(AUTHOR, total_passes=9, share=0.7), AdaptiveRollout(AUTHOR, total_passes=9)
    again.load_state_dict(rollout.state_dict())  # of an empty buffer
    batch = batch_of(asked_packs(), 0, 1)
    batch = {**batch, "routes": batch["documents"] % 3} if routed else batch
    rollout(batch, tiny_llama, {}, make_generator(1, 0, 0))
    rollout.on_evaluate(3.0)
    again.load_state_dict(rollout.state_dict())
    assert (again.share, again.last_loss, again.num_passes_done) == (0.7, 3.0, 1)
    for a, b in zip(rollout.buffer, again.buffer, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
        assert b.sampled
        assert a.fields == b.fields
        assert ("routes" in b.fields) is routed


def run(study: TrainingModule, folder: Path, **more: Any) -> AdaptiveRollout:
    rollout = AdaptiveRollout(AUTHOR, total_passes=12, share=0.6)
    rollout.last_loss = 0.0  # so that the first evaluation is worse
    options = settings(eval_every=2, micro_tokens=32, save_every=4)
    train(study, asked_packs(), options, folder, validation=asked_packs(9), rollout=rollout, show=False, **more)
    return rollout


def test_a_resumed_run_has_the_share_and_the_buffer_of_one_without_a_break(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    straight, again = study_of(tiny_llama), study_of(tiny_llama)
    first = run(straight, tmp_path)
    assert first.share > 0.6
    assert sum(line.get("rollout_replayed", 0) for line in read_run_metrics(tmp_path)) > 0
    (tmp_path / "checkpoint-6").rename(tmp_path / "gone")
    second = run(again, tmp_path, resume=True)
    assert_same_bits(straight, again)
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
