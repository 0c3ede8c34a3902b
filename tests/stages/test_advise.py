"""Advice on speculative decoding: what is tried, what is said, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.decode.families import make_stock_model
from tests.stages.world import saved, written
from tests.tiny import byte_tokenizer, random_llama

import potstill
from potstill.core.errors import DataError, OutputExists, PotstillError, UnsupportedModel, UsageError
from potstill.core.results import Report
from potstill.evaluate.speculation.candidates import Setting
from potstill.evaluate.speculation.prediction import Prediction
from potstill.stages.advice import Trial, make_advice, summarize_errors
from potstill.stages.advise import AdviseConfig

SMALL: dict[str, Any] = {"draft_length": "1,3", "prompts": 2, "max_tokens": 12, "runs": 1, "dtype": "float32"}


def trial(draft: str, predicted: float, measured: float | None = None, *, is_smaller: bool = True) -> Trial:
    prediction = Prediction(acceptance=[2 * predicted - 1], draft_cost=0.5, verify_cost=1.5)
    assert prediction.speed_up == pytest.approx(predicted)
    return Trial(setting=Setting(draft, length=2), prediction=prediction, measured=measured, is_smaller=is_smaller)


def test_the_fastest_measured_setting_is_advised() -> None:
    advice = make_advice([trial("a", 1.4, 1.1), trial("b", 1.2, 1.3), trial("c", 0.7, 0.7)])
    assert (advice.speculate, advice.flags, advice.speed_up) == (True, "--draft b --draft-length 2", 1.3)
    assert "1.30 times as fast as without drafts (predicted 1.20)" in advice.sentence
    assert "a pass writes 2.40 tokens and costs 2.00 plain passes" in advice.sentence


def test_what_is_not_measured_is_advised_by_its_prediction() -> None:
    advice = make_advice([trial("a", 1.4), trial("b", 1.2)])
    assert advice.flags == "--draft a --draft-length 2"
    assert "is predicted to decode 1.40 times as fast" in advice.sentence


@pytest.mark.parametrize("measured", [0.4, 1.0, 1.02])
def test_nothing_is_advised_that_is_not_faster_by_a_margin(measured: float) -> None:
    advice = make_advice([trial("a", 1.4, measured), trial("b", 0.8, 0.3)])
    assert (advice.speculate, advice.flags, advice.speed_up) == (False, "", 1.0)
    assert advice.sentence.startswith("Do not speculate: the best setting, --draft a --draft-length 2, decodes")


def test_a_draft_as_large_as_the_model_is_never_advised() -> None:
    large = trial("large", 1.9, 1.9, is_smaller=False)
    advice = make_advice([large])
    assert not advice.speculate
    assert "no larger than the draft large" in advice.sentence
    assert make_advice([large, trial("small", 1.1, 1.1)]).flags == "--draft small --draft-length 2"


def test_errors_are_summarized_by_their_size() -> None:
    trials = [trial("a", 1.1, 1.0), trial("b", 0.9, 1.0), trial("c", 1.0, 1.0), trial("d", 1.0)]
    assert summarize_errors(trials) == {"median": pytest.approx(0.1), "largest": pytest.approx(0.1)}
    assert summarize_errors([trial("d", 1.0)]) is None


def test_advice_holds_every_setting_with_prediction_and_measurement(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    result = potstill.advise(teacher, data=pairs, draft=["lookup", "exit:1"], tree=["2,1"], out=tmp_path / "a", **SMALL)
    assert isinstance(result, Report)
    shapes = [(each["draft"], each["draft_length"], each["tree"]) for each in result.settings]
    assert shapes == [
        *((draft, length, None) for draft in ("lookup", "exit:1") for length in (1, 3)),
        ("exit:1", None, "2,1"),  # lookup takes no tree
    ]
    for each in result.settings:
        assert each["predicted"] > 0
        assert each["measured"] > 0
        assert each["error"] == pytest.approx(each["predicted"] / each["measured"] - 1)
        assert len(each["acceptance"]) <= 3
    assert result.differences == []
    assert result.error["largest"] >= result.error["median"]
    assert set(result.verification_cost) == {"1", "3"}
    assert [(each["draft"], each["tree"]) for each in result.drafts] == [
        ("lookup", None), ("exit:1", None), ("exit:1", "2,1")
    ]  # fmt: skip
    assert result.conditions["dtype"] == "float32"
    assert result.data["prompts"] == 2
    stored = json.loads((tmp_path / "a/advice.json").read_text())
    assert stored == json.loads(json.dumps(result.to_dict()))
    assert result.advice["sentence"] in (tmp_path / "a/speed-up.html").read_text().replace("&#x27;", "'")
    with pytest.raises(OutputExists, match="is not empty"):
        potstill.advise(teacher, data=pairs, out=tmp_path / "a", **SMALL)
    potstill.advise(teacher, data=pairs, draft="lookup", out=tmp_path / "a", overwrite=True, check=False, **SMALL)
    assert len(json.loads((tmp_path / "a/advice.json").read_text())["settings"]) == 2


def test_without_a_check_nothing_is_measured(teacher: Path, text: Path) -> None:
    result = potstill.advise(teacher, data=text, check=False, **SMALL)
    assert {each["draft"] for each in result.settings} == {"lookup", "suffix"}
    assert {each["measured"] for each in result.settings} == {None}
    assert "error" not in result
    assert "predicted to decode" in result.advice["sentence"]


def test_a_model_that_drafts_for_itself_is_warned_of_and_not_advised(
    teacher: Path, pairs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = potstill.advise(teacher, data=pairs, draft=teacher, check=False, **SMALL)
    assert result.advice["speculate"] is False
    assert "no larger than the draft" in result.advice["sentence"]
    assert result.drafts[0]["acceptance"][0] == 1.0
    assert result.drafts[0]["is_smaller"] is False
    assert "drafts cost more than they save" in caplog.text


def test_sampled_answers_and_int8_weights_are_measured_too(teacher: Path, pairs: Path) -> None:
    result = potstill.advise(teacher, data=pairs, draft="exit:2", temperature=1.0, check=False, **SMALL)
    assert result.conditions["temperature"] == 1.0
    assert "differences" not in result
    int8 = potstill.advise(teacher, data=pairs, draft="lookup", **{**SMALL, "dtype": "int8"})
    assert int8.conditions["dtype"] == "int8"
    assert int8.differences == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": 0}, "--prompts is 0"),
        ({"max_tokens": 1}, "--max-tokens is 1; it must be at least 2"),
        ({"runs": 0}, "--runs is 0"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
        ({"draft_length": "2,zero"}, "--draft-length is '2,zero'; give numbers"),
        ({"draft_length": "0"}, "--draft-length is '0'"),
        ({"draft": ("lookup", "lookup")}, "--draft lookup is given twice"),
        ({"draft": ()}, "no draft is given"),
        ({"draft": ("exit",)}, "write --draft exit:LAYERS"),
        ({"tree": ("4,x",)}, "--tree is '4,x'"),
    ],
)
def test_an_option_out_of_range_is_refused_first(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        AdviseConfig(**{"model": "m", "data": "d", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 600}, "--max-tokens is 600, and .* has 512 tokens of context"),
        ({"draft_length": "600"}, "600 tokens in a row does not fit"),
        ({"tree": ["2,1"], "draft": ["lookup"]}, "lookup proposes one continuation"),
        ({"draft": "exit:9"}, "no number of layers from 1 to 2"),
    ],
)
def test_a_draft_that_does_not_fit_the_model_is_refused(
    teacher: Path, pairs: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        potstill.advise(teacher, data=pairs, **{**SMALL, **options})


def test_a_draft_with_another_vocabulary_is_refused(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(ascii=True)
    other = saved(tmp_path / "other", random_llama(tokenizer), tokenizer)
    with pytest.raises(PotstillError, match="another vocabulary than the model; write --draft translated:"):
        potstill.advise(teacher, data=pairs, draft=other, **SMALL)


def test_data_without_a_prompt_that_fits_is_refused(teacher: Path, tmp_path: Path) -> None:
    long = written(tmp_path / "long.jsonl", [{"prompt": "long " * 120, "response": "yes"}] * 2)
    with pytest.raises(DataError, match=r"all 2 prompts of .* are longer than the 500 tokens"):
        potstill.advise(teacher, data=long, **SMALL)
    answer: Any = {"messages": [{"role": "assistant", "content": "no question"}]}
    silent = written(tmp_path / "silent.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="nothing to train on"):
        potstill.advise(teacher, data=silent, **SMALL)
    assert potstill.advise(teacher, data=[answer] * 2, check=False, **SMALL).data["prompts"] == 2


def test_prompts_without_answers_are_read_by_their_column(teacher: Path, tmp_path: Path) -> None:
    questions = written(tmp_path / "questions.jsonl", [{"topic": f"What is {n}?"} for n in range(3)])
    columns = "prompt=topic,response=topic"
    result = potstill.advise(teacher, data=questions, columns=columns, check=False, **SMALL)
    assert result.data["prompts"] == 2


def test_a_model_that_cannot_take_tokens_back_is_refused(pairs: Path) -> None:
    tokenizer = byte_tokenizer()
    changes = {"state_size": 4, "conv_kernel": 3, "expand": 2, "time_step_rank": 4, "vocab_size": len(tokenizer)}
    model = make_stock_model("mamba", changes).float()
    with pytest.raises(UnsupportedModel, match="cannot take back tokens"):
        potstill.advise((model, tokenizer), data=pairs, **SMALL)
