"""Measured speeds."""

from tests.decode.drafters.targets import BUILDS, make_target

from potstill.decode.draft_length import FixedLength
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.decode.speculative import Speculation
from potstill.evaluate.speculation.timing import MeasuredSpeed, TimedText, measure_speeds, summarize_speed


def test_a_speed_is_the_tokens_over_the_median_times() -> None:
    first = [TimedText([1, 2, 3], 2, seconds) for seconds in (1.0, 9.0, 3.0)]
    second = [TimedText([4, 5], 1, seconds) for seconds in (1.0, 1.0, 1.0)]
    speed = summarize_speed([first, second])
    assert speed == MeasuredSpeed(tokens_per_second=3 / 4, texts=[[1, 2, 3], [4, 5]])
    assert summarize_speed([[TimedText([1], 0, 0.0)]]).tokens_per_second == 0


def test_the_first_difference_of_each_text_is_found() -> None:
    plain = MeasuredSpeed(tokens_per_second=1.0, texts=[[1, 2, 3], [4, 5], [6]])
    other = MeasuredSpeed(tokens_per_second=1.0, texts=[[1, 7, 3], [4, 5], [6, 8]])
    assert other.find_differences(plain) == [(0, 1), (2, 1)]
    assert plain.find_differences(plain) == []


def test_plain_decoding_and_drafts_write_the_same_texts() -> None:
    model = make_target("llama")
    runner = ModelRunner(model, vocabulary=model.config.vocab_size)
    sampling = Sampling(vocabulary=runner.vocabulary, stop=frozenset(), temperature=0.0)
    requests = [DecodeRequest(prompt=[5, 9, 20 + n], max_new_tokens=12, sampling=sampling) for n in range(2)]
    speculation = Speculation(drafter=BUILDS["suffix"](model, (1,) * 4), length=FixedLength(4), nodes=4)
    plain, (drafted,) = measure_speeds(runner, requests, [speculation], runs=2)
    assert plain.texts == drafted.texts
    assert [len(text) for text in plain.texts] == [12, 12]
    assert min(plain.tokens_per_second, drafted.tokens_per_second) > 0
