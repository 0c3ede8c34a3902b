"""Documents keep their fields when completions are sampled and replayed."""

import torch
from tests.train.rollouts.test_on_policy import AUTHOR, asked_packs, batch_of, roll
from transformers import LlamaForCausalLM

from potstill.core.types import Batch
from potstill.data.pack_fields import PackField, declare_field
from potstill.train.rollouts.base import count_prompt_tokens, make_generator, split_documents
from potstill.train.rollouts.replay import AdaptiveRollout

LIMIT = declare_field(PackField("test_limit", per="document", dtype="float32", fill=0.0))
PRIOR = declare_field(PackField("test_prior", per="token", dtype="float32", fill=-1.0))


def batch_with_fields(*, groups: bool = False) -> Batch:
    batch = batch_of(asked_packs(), 0, 1)
    count = int(batch["documents"].max()) + 1
    fields = {"test_limit": torch.arange(count).float(), "test_prior": torch.rand(batch["input_ids"].shape)}
    return {**batch, **fields, **({"groups": torch.arange(count) // 2} if groups else {})}


def test_a_sampled_document_keeps_the_fields_of_its_prompt(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_with_fields(groups=True)
    rolled = roll(1.0, batch, tiny_llama)
    assert torch.equal(rolled["test_limit"], batch["test_limit"])
    assert torch.equal(rolled["groups"], batch["groups"])
    for old, new in zip(split_documents(batch), split_documents(rolled), strict=True):
        prompt = count_prompt_tokens(old.labels, 4)
        assert torch.equal(new.fields["test_prior"][:prompt], old.fields["test_prior"][:prompt])
        assert (new.fields["test_prior"][prompt:] == -1).all()


def test_a_replayed_document_brings_its_fields_and_a_group_stays_as_it_is(tiny_llama: LlamaForCausalLM) -> None:
    for groups in (False, True):
        rollout = AdaptiveRollout(AUTHOR, total_passes=2, share=1.0)
        rollout(batch_with_fields(groups=groups), tiny_llama, {}, make_generator(1, 0, 0))
        assert all("groups" not in document.fields for document in rollout.buffer)
        rollout.num_passes_done = 2  # from here on documents are replayed, and none is sampled
        batch = batch_with_fields(groups=groups)
        replayed = rollout(batch, tiny_llama, {}, make_generator(1, 1, 0))
        assert (replayed is batch) == groups
        buffered = {tuple(one.input_ids.tolist()): float(one.fields["test_limit"]) for one in rollout.buffer}
        for document in split_documents(replayed) if not groups else []:
            expected = buffered.get(tuple(document.input_ids.tolist()))
            assert expected is None or expected == float(document.fields["test_limit"])


def test_the_buffer_s_fields_are_in_the_checkpoint(tiny_llama: LlamaForCausalLM) -> None:
    rollout, restored = (AdaptiveRollout(AUTHOR, total_passes=9, share=1.0) for _ in range(2))
    rollout(batch_with_fields(), tiny_llama, {}, make_generator(1, 0, 0))
    restored.load_state_dict(rollout.state_dict())
    assert len(restored.buffer) > 3
    for a, b in zip(rollout.buffer, restored.buffer, strict=True):
        assert a.fields.keys() == b.fields.keys() == {"test_limit", "test_prior"}
        assert all(torch.equal(a.fields[name], b.fields[name]) for name in a.fields)
