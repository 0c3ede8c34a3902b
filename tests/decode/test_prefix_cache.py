"""A slot that keeps its last text reads only what is new of the next prompt, and writes what it would write anew."""

from typing import Any

import pytest
from tests.decode.families import make_model
from tests.decode.test_engine import GREEDY, SAMPLED
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.engine import Engine
from potstill.decode.request import Completion, DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling

PLAIN = Sampling(vocabulary=97, stop=frozenset(), temperature=0.0)


def write(engine: Engine, prompt: list[int], sampling: Sampling = PLAIN, **options: Any) -> tuple[Completion, int]:
    """The answer to a prompt, and how many tokens of the prompt were read for it."""
    before = engine.stats.prompt_tokens
    request = DecodeRequest(prompt=prompt, max_new_tokens=8, sampling=sampling, seed=3, **options)
    request_id = engine.add(request)
    return engine.run()[request_id], engine.stats.prompt_tokens - before


@pytest.mark.parametrize(
    ("family", "reuses", "cuts"),
    [
        ("llama", True, True),
        ("potstill", True, True),
        ("gemma3_text", True, True),
        ("gpt2", True, True),
        ("deltanet", True, False),  # a recurrence continues a whole text, and goes back to no part of it
        ("bloom", False, False),
    ],
)
def test_a_chat_that_grows_is_read_from_where_it_is_new(family: str, reuses: bool, cuts: bool) -> None:
    model = make_model(family)
    engine = Engine(ModelRunner(model, vocabulary=97), reuse_prefix=True)
    ids = [5, 6, 7, 8, 9]
    for turn in range(3):
        completion, num_read = write(engine, ids)
        anew, _ = write(Engine(ModelRunner(model, vocabulary=97)), ids)
        assert completion.tokens == anew.tokens
        assert num_read == (4 if turn and reuses else len(ids))  # the last token was written, and not read
        ids = [*ids, *completion.tokens, 20 + turn, 30, 40]
    assert write(engine, ids[:4])[1] == (1 if cuts else 4)  # the last token of a prompt is always read
    parted, num_read = write(engine, [*ids[:3], 50, 51])
    assert num_read == (2 if cuts else 5)
    assert parted.tokens == write(Engine(ModelRunner(model, vocabulary=97)), [*ids[:3], 50, 51])[0].tokens
    assert write(engine, [60, 61, 62])[1] == 3


@pytest.mark.parametrize("draft", ["lookup", "suffix", "exit:2", "skip:1"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_writes_the_same_after_a_prefix(
    draft: str, sampling: Sampling, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def make_engine(*, reuse_prefix: bool) -> Engine:
        runner = ModelRunner(tiny_llama, vocabulary=259)
        speculation = make_speculation(runner, tiny_tokenizer, DraftOptions(draft=draft, draft_length="4"))
        return Engine(runner, tiny_tokenizer, speculation=speculation, reuse_prefix=reuse_prefix)

    engine = make_engine(reuse_prefix=True)
    first = [5, 6, 7, 5, 6, 7, 5]
    second = [*first, *write(engine, first, sampling)[0].tokens, 5, 6]
    completion, num_read = write(engine, second, sampling)
    assert num_read < len(second) - len(first)
    assert completion.tokens == write(make_engine(reuse_prefix=False), second, sampling)[0].tokens


def test_what_needs_the_whole_prompt_gets_it(tiny_llama: LlamaForCausalLM) -> None:
    engine = Engine(ModelRunner(tiny_llama, vocabulary=259), reuse_prefix=True)
    write(engine, [5, 6, 7, 8], GREEDY)
    completion, num_read = write(engine, [5, 6, 7, 8, 9], GREEDY, prompt_logprobs=1)
    assert num_read == 5
    assert [entry.token for entry in completion.prompt_logprobs or ()] == [6, 7, 8, 9]


def test_a_cancelled_text_leaves_what_was_read_of_it(tiny_llama: LlamaForCausalLM) -> None:
    engine, prompt = Engine(ModelRunner(tiny_llama, vocabulary=259), reuse_prefix=True), [5, 6, 7, 8]
    request_id = engine.add(DecodeRequest(prompt=prompt, max_new_tokens=50, sampling=GREEDY))
    (first, second) = engine.step()
    engine.cancel(request_id)
    engine.run()
    longer = [*prompt, first.token, second.token, 9]
    completion, num_read = write(engine, longer, GREEDY)
    assert num_read == 2
    assert completion.tokens == write(Engine(ModelRunner(tiny_llama, vocabulary=259)), longer, GREEDY)[0].tokens
