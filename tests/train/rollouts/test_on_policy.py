"""Rollouts: whose tokens a step trains on, that only completions are trained, and that all of it can be made again."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import assert_same_bits, settings, some_packs, study_of, weights
from torch import nn
from transformers import LlamaForCausalLM

from potstill.core.types import ALIGNED_GROUPS, ALIGNED_PAIRS, IGNORE, Batch, get_view, gold_mask, supervised_positions
from potstill.data.packing import Pack, Packs, collate, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.decode.sampling import Sampling
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.minillm import MiniLLM
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.divergence import reverse_kl
from potstill.train.rollouts.base import Document, count_prompt_tokens, make_generator, split_documents
from potstill.train.rollouts.on_policy import CompletionSampler, OnPolicyRollout
from potstill.train.run import read_run_metrics, train
from potstill.train.training_module import TrainingModule

STOP = 2
AUTHOR = CompletionSampler(
    sampling=Sampling(vocabulary=259, stop=frozenset({STOP})), max_length=32, default_prompt_length=4
)


def asked_packs(documents: int = 40) -> Packs:
    """Random documents with a prompt of 3 to 9 tokens and an answer of 2 to 14, the stop token among them."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for _ in range(documents):
        prompt, answer = (int(torch.randint(*bounds, (1,), generator=generator)) for bounds in ((3, 10), (1, 14)))
        ids = [*torch.randint(3, 250, (prompt + answer,), generator=generator).tolist(), STOP]
        rows.append(TokenizedDocument(ids, [IGNORE] * prompt + ids[prompt:]))
    return pack(rows, length=32, seed=1)


def batch_of(packs: Packs, *numbers: int) -> Batch:
    return collate([packs[n] for n in numbers])


def roll(share: float, batch: Batch, model: nn.Module, *, step: int = 0, author: CompletionSampler = AUTHOR) -> Batch:
    return OnPolicyRollout(share=share, sampler=author)(batch, model, {}, make_generator(1, step, 0))


def assert_same(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_with_share_zero_the_batch_is_the_same_object(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_of(asked_packs(), 0, 1)
    assert roll(0.0, batch, tiny_llama) is batch


def test_with_share_one_no_completion_of_the_data_is_left_and_no_prompt_is_touched(
    tiny_llama: LlamaForCausalLM,
) -> None:
    batch = batch_of(asked_packs(), 0, 1)
    rolled = roll(1.0, batch, tiny_llama)
    before, after = split_documents(batch), split_documents(rolled)
    assert len(before) == len(after) > 3
    for old, new in zip(before, after, strict=True):
        prompt = count_prompt_tokens(old.labels, 4)
        assert prompt == int((old.labels != IGNORE).nonzero()[0])
        assert torch.equal(new.input_ids[:prompt], old.input_ids[:prompt])
        assert (new.labels[:prompt] == IGNORE).all()
        assert torch.equal(new.labels[prompt:], new.input_ids[prompt:])
        assert not torch.equal(new.input_ids[prompt:], old.input_ids[prompt:])
        assert prompt < len(new.input_ids) <= len(old.input_ids)
    assert rolled["sampled"].all()
    assert not gold_mask(rolled).any()


def test_a_rolled_out_batch_is_packed_as_the_data_is(tiny_llama: LlamaForCausalLM) -> None:
    rolled = roll(0.5, batch_of(asked_packs(), 0, 1, 2), tiny_llama)
    assert 0 < rolled["sampled"].float().mean() < 1
    packs = [
        {"input_ids": one.input_ids, "labels": one.labels, "lengths": torch.tensor([len(one.input_ids)])}
        for one in split_documents(rolled)
    ]
    assert_same({name: values for name, values in rolled.items() if name != "sampled"}, collate(packs))


def test_what_is_written_is_for_whom_its_prompt_was_for(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_of(asked_packs(), 0, 1)
    found = roll(1.0, {**batch, "routes": batch["documents"] % 3}, tiny_llama)
    assert found["sampled"].any()
    assert torch.equal(found["routes"], found["documents"] % 3)


def test_what_was_not_rolled_out_is_as_it_was(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_of(asked_packs(), 0, 1, 2)
    rolled = roll(0.5, batch, tiny_llama)
    owners = torch.bincount(rolled["documents"][0], weights=rolled["sampled"][0].double())
    for old, new, own in zip(split_documents(batch), split_documents(rolled), owners.tolist(), strict=True):
        same = torch.equal(old.input_ids, new.input_ids) and torch.equal(old.labels, new.labels)
        assert same == (own == 0)


def test_how_a_step_is_cut_into_passes_changes_no_rollout(tiny_llama: LlamaForCausalLM) -> None:
    model, packs = tiny_llama.double(), asked_packs()
    rollout = OnPolicyRollout(share=0.6, sampler=AUTHOR)
    together = rollout(batch_of(packs, 0, 1, 2, 3), model, {}, make_generator(1, 5, 0))
    generator = make_generator(1, 5, 0)
    parts = [rollout(batch_of(packs, *some), model, {}, generator) for some in ((0,), (1, 2), (3,))]
    apart = [one for part in parts for one in split_documents(part)]
    for a, b in zip(split_documents(together), apart, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)


def test_each_seed_step_and_rank_writes_something_else_and_the_same_again(tiny_llama: LlamaForCausalLM) -> None:
    batch, rollout = batch_of(asked_packs(), 0), OnPolicyRollout(share=1.0, sampler=AUTHOR)
    found = {
        key: rollout(batch, tiny_llama, {}, make_generator(*key))["input_ids"][0].tolist()
        for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    }
    assert len({tuple(ids) for ids in found.values()}) == 4
    again = rollout(batch, tiny_llama, {}, make_generator(1, 0, 1))
    assert again["input_ids"][0].tolist() == found[1, 0, 1]


def test_a_companion_with_tokens_of_its_own_reads_what_was_written(tiny_llama: LlamaForCausalLM) -> None:
    def beside(read: Pack) -> Pack:
        pairs = torch.arange(len(read["input_ids"]))[:, None].expand(-1, 2)
        own = {f"teacher.{name}": values for name, values in read.items()}
        groups = dict.fromkeys(ALIGNED_GROUPS, torch.arange(len(read["input_ids"])))
        return {**read, **own, **groups, "aligned.tokens": pairs}

    packs = asked_packs()
    batch = collate([beside(packs[0])])
    for share in (0.0, 1.0):
        rolled = roll(share, batch, tiny_llama, author=replace(AUTHOR, extend_pack=beside))
        theirs = get_view(rolled, "teacher")
        assert all(torch.equal(theirs[name], rolled[name]) for name in ("input_ids", "labels", "documents"))
        assert torch.equal(rolled[ALIGNED_PAIRS][0], torch.arange(len(supervised_positions(rolled)[1])))


def test_plain_text_is_continued_from_its_first_tokens(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_of(some_packs(), 0, 1)
    rolled = roll(1.0, batch, tiny_llama)
    for old, new in zip(split_documents(batch), split_documents(rolled), strict=True):
        opening = min(4, len(old.input_ids) - 1)
        assert torch.equal(new.input_ids[:opening], old.input_ids[:opening])
        assert int((new.labels != IGNORE).nonzero()[0]) == opening


@pytest.mark.parametrize(
    ("labels", "prompt"),
    [
        pytest.param([IGNORE, 5, 6, 7, 8, 9], 4, id="plain text"),
        pytest.param([IGNORE, IGNORE, 5, 6, 7, 8], 4, id="a further window after a BOS"),
        pytest.param([IGNORE, IGNORE, IGNORE, 5, 6, 7], 3, id="a prompt of three tokens"),
        pytest.param([IGNORE, 5], 1, id="two tokens"),
        pytest.param([IGNORE, 5, 6], 2, id="less text than an opening"),
    ],
)
def test_the_prompt_is_what_precedes_the_first_trained_token(labels: list[int], prompt: int) -> None:
    assert count_prompt_tokens(torch.tensor(labels), 4) == prompt


class Says(LlamaForCausalLM):
    """A model that says one token with certainty, whatever it reads."""

    token = STOP

    def make(self) -> "Says":
        with torch.no_grad():
            self.model.norm.weight.zero_()
            self.lm_head = nn.Linear(32, 259, bias=True)
            self.lm_head.weight.zero_()
            self.lm_head.bias.copy_(50.0 * torch.nn.functional.one_hot(torch.tensor(self.token), 259))
        return self


def test_an_empty_completion_trains_its_stop_token_and_is_counted(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.config.tie_word_embeddings = False
    model, batch = Says(tiny_llama.config).make().eval(), batch_of(asked_packs(), 0)
    rollout = OnPolicyRollout(share=1.0, sampler=AUTHOR)
    rolled = rollout(batch, model, {}, make_generator(1, 0, 0))
    _, targets, segment = supervised_positions(rolled)
    count = len(split_documents(batch))
    assert targets.tolist() == [STOP] * count
    assert segment.tolist() == list(range(count))
    assert rollout.tally == Counter(documents=count, tokens=count, empty=count, cut=0)


def test_an_endless_completion_is_cut_to_the_length_of_what_it_replaces_and_counted(
    tiny_llama: LlamaForCausalLM,
) -> None:
    tiny_llama.config.tie_word_embeddings = False
    model, batch = Says(tiny_llama.config), batch_of(asked_packs(), 0)
    model.token = 77
    rollout = OnPolicyRollout(share=1.0, sampler=AUTHOR)
    rolled = rollout(batch, model.make().eval(), {}, make_generator(1, 0, 0))
    assert (supervised_positions(rolled)[1] == 77).all()
    assert torch.equal(rolled["documents"], batch["documents"])
    assert rollout.tally["cut"] == rollout.tally["documents"] == len(split_documents(batch))
    assert rollout.tally["empty"] == 0


def test_a_document_without_a_trained_token_is_left_alone(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.arange(5, 12)
    batch = AUTHOR.make_batch(
        [
            Document(ids, torch.full_like(ids, IGNORE)),
            Document(ids, torch.cat([ids[:0], torch.full((4,), IGNORE), ids[4:]])),
        ],
        torch.device("cpu"),
    )
    rolled = roll(1.0, batch, tiny_llama)
    assert torch.equal(split_documents(rolled)[0].input_ids, ids)
    assert rolled["sampled"][0].tolist()[:7] == [False] * 7
    assert rolled["sampled"][0, 7:].all()


def test_a_student_of_all_its_modes_is_in_them_afterwards(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    before = [module.training for module in tiny_llama.modules()]
    roll(1.0, batch_of(asked_packs(), 0), tiny_llama)
    assert [module.training for module in tiny_llama.modules()] == before


def test_cross_entropy_is_of_the_data_alone_and_the_divergence_of_all(tiny_llama: LlamaForCausalLM) -> None:
    study = study_of(tiny_llama.double())
    rolled = roll(0.5, batch_of(asked_packs(), 0, 1, 2), study.student)
    documents = split_documents(rolled)
    owners = torch.bincount(rolled["documents"][0], weights=rolled["sampled"][0].double()) > 0
    parts = [AUTHOR.make_batch([one], torch.device("cpu")) for one in documents]  # each as if it came from the data
    for part in parts:
        del part["sampled"]  # type: ignore[attr-defined]
    sums = torch.stack([study(**part)["sums"] for part in parts])
    counts = torch.stack([study.counts(part) for part in parts])
    found = study(**rolled)["sums"]
    torch.testing.assert_close(found[0], sums[~owners, 0].sum())
    torch.testing.assert_close(found[1], sums[:, 1].sum())
    assert study.counts(rolled).tolist() == [counts[~owners, 0].sum(), counts[:, 1].sum()]


def test_no_gradient_of_cross_entropy_comes_from_what_was_sampled(tiny_llama: LlamaForCausalLM) -> None:
    study = TrainingModule(tiny_llama, WeightedSum((1.0, CrossEntropy())))
    rolled = roll(1.0, batch_of(asked_packs(), 0), tiny_llama)
    study(**rolled)["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in study.parameters())


def run(study: TrainingModule, folder: Path, share: float | None, **more: Any) -> Any:
    rollout = None if share is None else OnPolicyRollout(share=share, sampler=AUTHOR)
    packs = more.pop("packs", None) or asked_packs()
    return train(study, packs, settings(**more.pop("changes", {})), folder, rollout=rollout, show=False, **more)


def test_a_run_with_share_zero_is_a_run_without_bit_for_bit(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    first, second = study_of(tiny_llama), study_of(tiny_llama)
    run(first, tmp_path / "a", None)
    run(second, tmp_path / "b", 0.0)
    assert_same_bits(first, second)


def test_a_resumed_run_rolls_out_what_the_first_one_would_have(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    straight, again = study_of(tiny_llama), study_of(tiny_llama)
    run(straight, tmp_path / "a", 0.5)
    (tmp_path / "a" / "checkpoint-6").rename(tmp_path / "gone")
    run(again, tmp_path / "a", 0.5, resume=True)
    assert_same_bits(straight, again)


def test_accumulation_changes_nothing(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    studies = [study_of(tiny_llama.double()) for _ in range(2)]
    for micro, study in zip((64, 32), studies, strict=True):
        run(study, tmp_path / str(micro), 0.5, changes={"micro_tokens": micro, "tokens": 128})
    theirs = dict(studies[1].student.named_parameters())
    for name, weight in studies[0].student.named_parameters():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-8)


def test_the_metrics_say_what_was_rolled_out(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    run(study_of(tiny_llama), tmp_path / "a", 1.0)
    lines = [line for line in read_run_metrics(tmp_path / "a") if "loss" in line]
    assert all(line["rollout_documents"] > 0 for line in lines)
    assert all(line["rollout_tokens"] >= line["rollout_documents"] for line in lines)
    assert all(line["rollout_cut"] + line["rollout_empty"] <= line["rollout_documents"] for line in lines)
    assert all(line["cross_entropy"] == 0 for line in lines)
    assert sum(line["rollout_tokens"] for line in lines) < lines[-1]["tokens"]


def test_a_teacher_that_writes_along_is_rewarded_for(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    single = LogitDistillation(divergence=reverse_kl)
    study = study_of(tiny_llama, objective=WeightedSum((0.5, CrossEntropy()), (1.0, MiniLLM()), (1.0, single)))
    before = weights(study)
    rollout = OnPolicyRollout(share=0.5, sampler=replace(AUTHOR, teacher_share=0.2))
    with pytest.raises(KeyError, match="teacher"):  # it is asked
        replace(rollout, share=1.0)(batch_of(asked_packs(), 0), study.student, {}, make_generator(1, 0, 0))
    train(study, asked_packs(), settings(), tmp_path, rollout=rollout, show=False)
    lines = [line for line in read_run_metrics(tmp_path) if "loss" in line]
    for term in ("policy", "cross_entropy", "distill"):
        assert any(line[term] != 0 for line in lines), term
    assert not torch.equal(before["model.norm.weight"], weights(study)["model.norm.weight"])
