"""The stage of `generate --select`: its options, and that a stopped one continues to the same result."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.stages.world import written

import potstill
from potstill.cli.commands.generate import generate
from potstill.core.errors import DataError, Interrupted, OutputExists, RewardFailed, UsageError
from potstill.stages.candidates import sampler, select_mixed
from potstill.stages.candidates.config import CandidatesConfig


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_neither_the_batch_nor_the_parts_change_the_result(
    stage: CandidatesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = stage.run(tmp_path / "made")
    assert card["stage"] == stage.to_dict()
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"train.jsonl", "validation.jsonl", "card.json"}
    monkeypatch.setattr(sampler, "PROMPTS_PER_PART", 3)
    replace(stage, batch=2).run(tmp_path / "again")
    assert rows_of(tmp_path / "made") == rows_of(tmp_path / "again")


def test_a_stopped_selection_continues_to_the_same_rows(
    stage: CandidatesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(stage, select="prefer", reward="accuracy", consistency="text", samples=8, max_tokens=12)
    monkeypatch.setattr(sampler, "PROMPTS_PER_PART", 4)
    stage.run(tmp_path / "straight")
    original, calls = sampler.generate_samples, iter(range(100))

    def stop(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(sampler, "generate_samples", stop)
    with pytest.raises(Interrupted, match="--resume"):
        stage.run(tmp_path / "made")
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["training"]
    with pytest.raises(UsageError, match="begun with samples 8, and now it is 5"):
        replace(stage, samples=5).run(tmp_path / "made", resume=True)
    stage.run(tmp_path / "made", resume=True)
    assert rows_of(tmp_path / "made") == rows_of(tmp_path / "straight")
    assert stage.run(tmp_path / "made", resume=True)["stage"] == stage.to_dict()
    with pytest.raises(OutputExists):
        stage.run(tmp_path / "made")


def test_a_selection_that_was_stopped_needs_the_same_excluded_prompts(
    stage: CandidatesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, copy = tmp_path / "used.jsonl", tmp_path / "copy.jsonl"
    stage = replace(stage, exclude=(str(written(used, [{"id": 3, "prompt": "What is 3 + 1?"}])),))
    stage.run(tmp_path / "straight")
    for module in (sampler, select_mixed):
        monkeypatch.setattr(module, "PROMPTS_PER_PART", 4)
    assert stop_after_a_part(stage, tmp_path / "made", monkeypatch) == 1
    shutil.copy(used, copy)
    written(used, [{"id": 4, "prompt": "What is 4 + 1?"}])
    with pytest.raises(UsageError, match="was begun with other excluded prompts"):
        stage.run(tmp_path / "made", resume=True)
    replace(stage, exclude=(str(copy),)).run(tmp_path / "made", resume=True)
    assert rows_of(tmp_path / "made") == rows_of(tmp_path / "straight")


def stop_after_a_part(stage: CandidatesConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of parts that a stopped run leaves in `out`."""
    original, calls = sampler.generate_samples, iter(range(100))

    def stop(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "generate_samples", stop)
        with pytest.raises(Interrupted, match="--resume"):
            stage.run(out)
    return len(list((out / "training").glob("part-*.jsonl")))


def test_the_samples_stay_where_a_reward_fails(
    stage: CandidatesConfig, rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = stage.run(tmp_path / "straight")["details"]
    stage = replace(stage, reward=f"{rewards}:fails_once")
    with pytest.raises(RewardFailed, match="fails_once raises KeyError"):
        stage.run(tmp_path / "made")
    monkeypatch.setattr(sampler, "generate_samples", None)  # nothing is sampled again
    assert stage.run(tmp_path / "made", resume=True)["details"] == expected


def test_python_selects_as_the_stage_does(stage: CandidatesConfig, tmp_path: Path) -> None:
    exclude = str(written(tmp_path / "used.jsonl", [{"id": 3, "prompt": "What is 3 + 1?"}]))
    stage = replace(stage, exclude=(exclude,))
    stage.run(tmp_path / "made")
    options: Any = {name: getattr(stage, name) for name in ("select", "reward", "samples", "max_tokens", "dtype")}
    options |= {"exclude": exclude, "temperature": 1.0}  # one name instead of a list
    result = potstill.generate(stage.model, data=stage.data, out=tmp_path / "python", **options)
    assert not isinstance(result, str)
    assert result["stage"] == stage.to_dict()
    assert rows_of(tmp_path / "python") == rows_of(tmp_path / "made")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"select": "best"}, "--select 'best' is none of prefer, mixed, solve"),
        ({"samples": 1}, "--samples is 1; --select mixed compares samples, so draw 2 or more"),
        ({"samples": -1}, "at least 1"),
        ({"temperature": 0.0}, "all the same at --temperature 0; give one above 0, such as 0.9"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"consistency": "sound"}, "--consistency 'sound' is none of numbers, code, text"),
        ({"pivot_answer": "last"}, "--pivot-answer 'last' is none of consistent, first"),
        ({"per_language": -1}, "per_language is -1"),
        ({"consistency": "text"}, "--consistency is for --select prefer; omit it with --select mixed"),
        ({"pivot_pairs": True}, "--pivot-pairs is for --select prefer; omit it with --select mixed"),
        ({"pivot_answer": "first"}, "--pivot-answer is for --select prefer"),
        (
            {"select": "solve", "consistency": "text"},
            "--consistency is for --select prefer; omit it with --select solve",
        ),
        ({"select": "solve", "exclude": ("d",)}, "--exclude is for --select mixed; omit it with --select solve"),
        ({"select": "solve", "per_language": 3}, "--per-language is for --select mixed"),
        ({"select": "prefer"}, "--reward is for --select mixed or solve; omit it with --select prefer"),
        ({"select": "prefer", "reward": "accuracy", "exclude": ("d",)}, "--exclude is for --select mixed"),
    ],
)
def test_options_that_are_none_are_refused(change: dict[str, Any], sentence: str, stage: CandidatesConfig) -> None:
    with pytest.raises(UsageError, match=sentence):
        replace(stage, **change)


def test_the_pivot_is_a_language_as_rows_have_it(stage: CandidatesConfig) -> None:
    assert replace(stage, pivot="pt-BR").pivot == replace(stage, pivot="PT").pivot == "pt"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "d", "out": "o", "samples": 8}, "--samples is for --select; give that too"),
        ({"prompt": "hi", "select": "mixed"}, "--select compares samples for the prompts of a data set"),
        ({"prompt": "hi", "translate": True}, "--translate is for the prompts of a data set; give --data and --out"),
        ({"data": "d", "out": "o", "select": "mixed", "self_instruct": 4}, "--self-instruct rewrites prompts, and"),
        ({"data": "d", "out": "o", "source_language": "fr"}, "--source-language is for --translate; give that too"),
        ({"data": "d", "out": "o", "instruct_prompt": "{examples}"}, "--instruct-prompt is for --self-instruct"),
    ],
)
def test_python_refuses_what_nothing_reads(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        potstill.generate("smollm2", **options)


def test_a_selection_has_eight_samples_and_solutions_32() -> None:
    options: dict[str, Any] = {"model": "m", "data": "d", "temperature": 0.9}
    assert CandidatesConfig(select="mixed", **options).samples == 8
    assert CandidatesConfig(select="solve", **options).samples == 32


def test_the_command_refuses_samples_without_a_selection_and_a_selection_without_data() -> None:
    with pytest.raises(UsageError, match="--samples is for --select; give that too, such as --select mixed"):
        call(data="d", out="o", samples=4)
    with pytest.raises(UsageError, match="--select compares samples for the prompts of a data set"):
        call(prompt="Hello", select="mixed")


def call(**options: Any) -> Any:
    """The command with these options, and the defaults of all others."""
    from potstill.cli.commands.generate import check_options
    from potstill.core.options import list_options
    from potstill.stages.candidates.options import CandidateOptions
    from potstill.stages.generate_options import AnswerOptions

    names = {"prompt": None, "data": None, "out": None}
    fields = (*list_options(CandidateOptions), *list_options(AnswerOptions))
    values = {field.name: field.option.default for field in fields} | options
    given = {name: values.pop(name, None) for name in names}
    check_options(given["prompt"], given["data"], given["out"], values, chat=False, show=False, as_json=False)
    return generate


def test_a_dry_run_names_the_prompts_and_samples(stage: CandidatesConfig, tmp_path: Path) -> None:
    from potstill.stages.dry_run import preview_answers

    report = preview_answers(stage, tmp_path / "made")
    data = report["data"]
    assert data["prompts"] + data["held_out"] == 20
    assert data["samples"] == 4
    assert not (tmp_path / "made").exists()


def test_a_reward_that_does_not_exist_is_refused_before_anything_is_written(
    stage: CandidatesConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="there is no reward 'accurate'"):
        replace(stage, reward="accurate").run(tmp_path / "made")
    with pytest.raises(DataError, match=r"has no `answer`, which --reward .* reads"):
        replace(stage, reward="accuracy", data=str(drop_answers(tmp_path, stage))).run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def drop_answers(tmp_path: Path, stage: CandidatesConfig) -> Path:
    file = tmp_path / "open.jsonl"
    lines = [json.loads(line) for line in Path(str(stage.data)).read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "answer": None}) + "\n" for row in lines))
    return file
