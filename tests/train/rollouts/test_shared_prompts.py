"""Rollouts read answers with the prompt that they share, and give batches that share it."""

import torch
from tests.models.shared import shared_batch, shared_packs
from tests.train.rollouts.test_on_policy import AUTHOR, assert_same, roll
from transformers import LlamaForCausalLM

from potstill.core.types import IGNORE
from potstill.data.packing import collate
from potstill.ops.layout import repeat_prompts, unpack
from potstill.train.rollouts.base import count_prompt_tokens, join_documents, make_generator, split_documents
from potstill.train.rollouts.replay import AdaptiveRollout


def test_documents_of_a_shared_prompt_are_whole_and_join_to_the_same_batch() -> None:
    batch = shared_batch()
    documents = split_documents(batch)
    assert [document.prefix_length for document in documents] == [0, 6, 6, 0, 0, 0, 0, 3, 3]
    prompt, first, second = documents[:3]
    assert first.input_ids[:6].tolist() == second.input_ids[:6].tolist() == prompt.input_ids.tolist()
    assert [count_prompt_tokens(document.labels, 4) for document in (first, second)] == [7, 7]
    assert (first.labels[:7] == IGNORE).all()
    assert_same(collate([join_documents(documents)]), batch)


def test_documents_without_their_prompt_stay_whole_and_the_first_of_them_serves_as_one() -> None:
    whole = split_documents(collate(shared_packs()[1:]))
    pack = join_documents(whole[1:])
    assert pack["lengths"].tolist() == [10, 7]
    assert pack["offsets"].tolist() == [0, 3]
    found = unpack(collate([pack]))
    assert found["input_ids"].tolist() == [document.input_ids.tolist() for document in whole[1:]]
    assert join_documents([whole[1].drop_numbers(), whole[2].drop_numbers()])["lengths"].tolist() == [10, 10]


def test_a_model_samples_the_same_answers_to_a_shared_prompt_as_to_a_repeated_one(
    tiny_llama: LlamaForCausalLM,
) -> None:
    tiny_llama.double()
    shared, whole = roll(1.0, shared_batch(), tiny_llama), roll(1.0, repeat_prompts(shared_batch()), tiny_llama)
    assert shared["input_ids"].shape[1] < whole["input_ids"].shape[1]
    assert torch.equal(shared["pairs"], whole["pairs"])
    shared, whole = unpack(shared), unpack(whole)
    for name in ("input_ids", "labels", "position_ids", "documents", "sampled"):
        assert torch.equal(shared[name], whole[name]), name
    is_pair = torch.tensor([False, True, True, True, True, True, False, True, True])
    assert torch.equal(shared["sampled"].any(1), is_pair)


def test_a_buffer_holds_answers_with_their_own_prompt(tiny_llama: LlamaForCausalLM) -> None:
    rollout = AdaptiveRollout(AUTHOR, total_passes=2, share=1.0)
    rollout(shared_batch(), tiny_llama, {}, make_generator(1, 0, 0))
    assert {document.prefix_length for document in rollout.buffer} == {0}
    assert all("offsets" not in document.fields for document in rollout.buffer)
    restored = AdaptiveRollout(AUTHOR, total_passes=2, share=1.0)
    restored.load_state_dict(rollout.state_dict())
    for a, b in zip(rollout.buffer, restored.buffer, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
