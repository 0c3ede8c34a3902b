"""An answer streams its text, counts its tokens, and can be ended at any time."""

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.decode.answer_stream import AnswerStream
from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.engine import Engine
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling

SAMPLING = Sampling(vocabulary=259, stop=frozenset(), temperature=0.0)


def make_engine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, draft: str | None = None) -> Engine:
    runner = ModelRunner(model, vocabulary=259)
    length = None if draft is None else "4"
    speculation = make_speculation(runner, tokenizer, DraftOptions(draft=draft, draft_length=length))
    return Engine(runner, tokenizer, speculation=speculation, reuse_prefix=True)


def stream(engine: Engine, max_new_tokens: int = 20) -> AnswerStream:
    return AnswerStream(
        engine, DecodeRequest(prompt=[5, 6, 7, 5, 6, 7], max_new_tokens=max_new_tokens, sampling=SAMPLING)
    )


def test_an_answer_counts_its_tokens_and_its_speed(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = stream(make_engine(tiny_llama, tiny_tokenizer))
    assert answer.to_dict()["finish_reason"] is None
    tiny_llama.train()
    events = list(answer)
    assert tiny_llama.training
    assert answer.text == "".join(event.text for event in events)
    numbers = answer.to_dict()
    assert numbers.pop("tokens_per_second") == 19 / answer.stats.seconds
    assert numbers.pop("prompt_tokens_per_second") == 6 / answer.stats.prompt_seconds
    assert numbers == {
        "text": answer.text,
        "finish_reason": "length",
        "prompt_tokens": 6,
        "new_tokens": 20,
        "tokens_per_pass": 1.0,
        "drafted": 0,
        "accepted": 0,
    }


def test_one_token_has_no_speed(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    answer = stream(make_engine(tiny_llama, tiny_tokenizer), max_new_tokens=1)
    assert len(list(answer)) == 1
    assert answer.tokens_per_second is None


def test_accepted_tokens_are_those_of_the_text_that_a_draft_proposed(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = stream(make_engine(tiny_llama, tiny_tokenizer, "lookup"), max_new_tokens=60)
    events = list(answer)
    assert answer.num_accepted == sum(event.drafted for event in events) > 0
    assert answer.stats.drafted >= answer.num_accepted
    assert answer.tokens_per_pass is not None
    assert answer.tokens_per_pass * answer.stats.steps == 59
    assert answer.text == "".join(e.text for e in stream(make_engine(tiny_llama, tiny_tokenizer), 60))


def test_an_answer_that_is_cancelled_or_left_frees_the_engine(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make_engine(tiny_llama, tiny_tokenizer)
    cancelled = stream(engine, max_new_tokens=100)
    for event in cancelled:
        if event.finish_reason is None:
            cancelled.cancel()
    assert cancelled.completion.finish_reason == "cancelled"
    assert len(cancelled.completion.tokens) == 2  # the first one comes with the prompt, in one step with the second
    never = stream(engine)
    never.cancel()
    assert [event.token for event in never] == [None]
    for _ in stream(engine, max_new_tokens=100):
        break
    assert not engine.has_work
    assert len(list(stream(engine))) == 20
