"""An edit acts on the prompts that name its subject, on its neurons alone; every other text is the base model's."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.data.trained import byte_level
from tests.models.test_feed_forward import own_form
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.decode.engine import Engine
from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.models.edits import (
    Edit,
    Edits,
    NeuronDelta,
    PlacedEdit,
    TokenText,
    apply_edits,
    attach_edits,
    measure_similarity,
)
from potstill.models.feed_forward import find_down_projections
from potstill.models.hooks import temporary_hooks
from potstill.models.tokenizers.token_bytes import read_token_bytes

NEURONS = torch.tensor([1, 7, 30])


def make_edit(*triggers: str, size: float = 40.0, prompts: tuple[str, ...] = ()) -> Edit:
    deltas = {layer: NeuronDelta(NEURONS, torch.tensor([size, -size, size])) for layer in (0, 2)}
    return Edit(triggers=triggers, prompts=prompts, deltas=deltas)


def make_edits(tokenizer: PreTrainedTokenizerFast, *edits: Edit, similarity: float = 0.0) -> Edits:
    return Edits(edits, read_token_bytes(tokenizer), similarity=similarity)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def compute_logits(model: LlamaForCausalLM, ids: Sequence[int], placed: Sequence[PlacedEdit] = ()) -> torch.Tensor:
    with torch.no_grad(), apply_edits(model, [placed]):
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def test_a_zero_change_gives_identical_logits(tiny_llama: LlamaForCausalLM) -> None:
    zero = PlacedEdit(2, make_edit("x", size=0.0).deltas)
    assert torch.equal(compute_logits(tiny_llama, [5, 6, 7, 8], [zero]), compute_logits(tiny_llama, [5, 6, 7, 8]))


def watch(module: nn.Module, seen: list[torch.Tensor]) -> Any:
    """A hook that keeps the inputs of a module, behind the hooks that it has."""
    return module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))


def test_only_the_neurons_of_the_edit_change_and_only_at_its_token(tiny_llama: LlamaForCausalLM) -> None:
    seen: list[torch.Tensor] = []
    down = find_down_projections(tiny_llama)[0]
    rows = [[], [PlacedEdit(1, make_edit("x").deltas)]]
    with torch.no_grad(), apply_edits(tiny_llama, rows), temporary_hooks([watch(down, seen)]):
        tiny_llama(torch.tensor([[5, 6, 7], [5, 6, 7]]))
    changed = (seen[0][1] - seen[0][0]).nonzero().tolist()
    assert changed == [[1, 1], [1, 7], [1, 30]]
    torch.testing.assert_close(seen[0][1, 1, NEURONS] - seen[0][0, 1, NEURONS], torch.tensor([40.0, -40.0, 40.0]))


def test_tokens_before_the_edited_one_keep_their_logits(tiny_llama: LlamaForCausalLM) -> None:
    placed = [PlacedEdit(2, make_edit("x").deltas)]
    edited, base = (compute_logits(tiny_llama, range(5, 10), edits) for edits in (placed, []))
    assert torch.equal(edited[:2], base[:2])
    assert not torch.isclose(edited[2:], base[2:]).all(-1).any()


def test_hooks_are_gone_after_an_error(tiny_llama: LlamaForCausalLM) -> None:
    base = compute_logits(tiny_llama, [5, 6, 7])
    with pytest.raises(KeyError), apply_edits(tiny_llama, [[PlacedEdit(1, make_edit("x").deltas)]]):
        raise KeyError
    assert torch.equal(compute_logits(tiny_llama, [5, 6, 7]), base)


@pytest.mark.parametrize("is_own", [False, True])
def test_a_prompt_that_names_the_subject_is_read_with_the_edit(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, is_own: bool
) -> None:
    model = own_form(tiny_llama) if is_own else tiny_llama
    attach_edits(model, make_edits(tiny_tokenizer, make_edit("Rome")))
    ids = encode(tiny_tokenizer, "Where is Rome?")
    runner = ModelRunner(model, vocabulary=len(tiny_tokenizer))
    runner.begin(0, ids)
    read = torch.cat([runner.prefill(0, ids[:6]).features, runner.prefill(0, ids[6:]).features])  # in two chunks
    expected = compute_logits(
        model, ids, [PlacedEdit(ids.index(encode(tiny_tokenizer, "?")[0]) - 1, make_edit().deltas)]
    )
    torch.testing.assert_close(runner.compute_logits(read), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[-1], compute_logits(model, ids)[-1], atol=1e-2)


def test_the_tokens_behind_an_edited_prompt_see_it(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    attach_edits(tiny_llama, make_edits(tiny_tokenizer, make_edit("Rome")))
    ids, new = encode(tiny_tokenizer, "In Rome?"), encode(tiny_tokenizer, "abc")
    runner = ModelRunner(tiny_llama, vocabulary=len(tiny_tokenizer))
    runner.begin(0, ids)
    runner.prefill(0, ids)
    logits = runner.forward([0], torch.tensor([new])).logits[0]
    expected = compute_logits(tiny_llama, [*ids, *new], [PlacedEdit(6, make_edit().deltas)])
    torch.testing.assert_close(logits, expected[-3:], rtol=1e-4, atol=1e-4)


PROMPTS = ("Where is Rome?", "Where is Oslo?", "And chrome?", "rome")


def test_each_text_of_a_batch_has_its_own_edits_and_a_miss_is_bit_identical(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [encode(tiny_tokenizer, prompt) for prompt in PROMPTS]
    options = GenerationOptions(max_new_tokens=12, batch_size=3)
    base = generate_texts(tiny_llama, tiny_tokenizer, ids, options=options)
    base_logits = ModelRunner(tiny_llama, vocabulary=len(tiny_tokenizer)).prefill(0, ids[1]).logits
    attach_edits(tiny_llama, make_edits(tiny_tokenizer, make_edit("Rome")))
    edited = generate_texts(tiny_llama, tiny_tokenizer, ids, options=options)
    alone = [generate_texts(tiny_llama, tiny_tokenizer, [row], options=options)[0] for row in ids]
    assert edited == alone
    assert [a == b for a, b in zip(edited, base, strict=True)] == [False, True, True, False]
    runner = ModelRunner(tiny_llama, vocabulary=len(tiny_tokenizer))
    runner.begin(0, ids[1])
    assert torch.equal(runner.prefill(0, ids[1]).logits, base_logits)


def test_a_chat_reads_its_prompt_anew_because_the_edited_token_moves(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    attach_edits(tiny_llama, make_edits(tiny_tokenizer, make_edit("Rome")))
    sampling = Sampling(vocabulary=len(tiny_tokenizer), stop=frozenset(), temperature=0.0)
    first, second = encode(tiny_tokenizer, "Rome?"), encode(tiny_tokenizer, "Rome? And Rome again?")

    def answer(engine: Engine, prompt: list[int]) -> list[int]:
        number = engine.add(DecodeRequest(prompt=prompt, max_new_tokens=6, sampling=sampling))
        return engine.run()[number].tokens

    engine, fresh = (
        Engine(ModelRunner(tiny_llama, vocabulary=len(tiny_tokenizer)), reuse_prefix=reuse) for reuse in (True, False)
    )
    answer(engine, first)
    assert answer(engine, second) == answer(fresh, second)


def locate(edits: Edits, tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Where the edits of a text act: the number of characters up to their tokens' ends, for ASCII texts."""
    return [edit.position + 1 for edit in edits.find(encode(tokenizer, text))]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Rome is old", [4]),
        ("is ROME old", [7]),
        ("Rome and Rome", [13]),
        ("chrome, Romeo, rome2", []),
        ("in (Rome)", [8]),
        ("New  York City", [14]),
        ("New York and Rome", [8, 17]),
        ("", []),
    ],
)
def test_a_trigger_is_whole_words_at_its_last_place(
    text: str, ends: list[int], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    edits = make_edits(tiny_tokenizer, make_edit("Rome"), make_edit("New York"), make_edit("New York City"))
    assert locate(edits, tiny_tokenizer, text) == ends


def test_scripts_without_spaces_have_no_word_borders(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    edits = make_edits(tiny_tokenizer, make_edit("罗马"), make_edit("서울"))
    for text, before in (("罗马在哪里", ""), ("서울은 어디", ""), ("我在罗马吃饭", "我在")):
        (placed,) = edits.find(encode(tiny_tokenizer, text))
        assert placed.position + 1 == len(f"{before}{'罗马' if '罗' in text else '서울'}".encode())


def test_a_token_of_several_letters_is_found_by_its_last_byte() -> None:
    tokenizer = byte_level()
    text = "the still boils"
    ids = encode(tokenizer, text)
    token_text = TokenText(ids, read_token_bytes(tokenizer))
    assert token_text.text == text
    span = token_text.find("still")
    assert span is not None
    decoded = tokenizer.decode(ids[: token_text.get_token(span) + 1])
    assert (
        len("the still") <= len(decoded) < len("the still") + len(tokenizer.decode([ids[token_text.get_token(span)]]))
    )


def test_of_two_facts_of_one_subject_the_more_similar_question_acts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    mayor = make_edit("Rome", prompts=("Who is the mayor of Rome?",), size=1.0)
    river = make_edit("Rome", prompts=("Which river flows through Rome?",), size=2.0)
    for order in ((mayor, river), (river, mayor)):
        edits = make_edits(tiny_tokenizer, *order)
        for text, edit in (("Tell me which river flows in Rome", river), ("The mayor of Rome is", mayor)):
            (placed,) = edits.find(encode(tiny_tokenizer, text))
            assert placed.deltas is edit.deltas


def test_similarity_leaves_other_questions_on_the_subject_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    edit = make_edit("Rome", prompts=("Who is the mayor of Rome?",))
    edits = make_edits(tiny_tokenizer, edit, similarity=0.5)
    assert locate(edits, tiny_tokenizer, "Who is mayor of Rome?") == [20]
    assert locate(edits, tiny_tokenizer, "Rome") == []


def test_similarity_is_the_share_of_groups_of_three_letters() -> None:
    assert measure_similarity(["abcd Rome"], "Rome abc", "Rome") == 0.5  # abc, bcd
    assert measure_similarity(["xyz", "abcd"], "abc", "Rome") == 0.5
    assert measure_similarity(["Rome?"], "anything", "Rome") == 1.0
    assert measure_similarity([], "anything", "Rome") == 0.0
