"""The doctor on pairs with two tokenizers: faults that are planted, and honest pairs."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.trained import byte_level, sentencepiece, unigram
from tests.stages.test_doctor import ENDS, HEADS, SIZES, failed
from tests.stages.test_measure import foreign
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from potstill.core.errors import UsageError
from potstill.models import signals as reading
from potstill.models.load import LoadedModel
from potstill.objectives.config import ObjectiveConfig
from potstill.ops import align
from potstill.stages.checks.cross_tokenizer import run_cross_tokenizer_checks
from potstill.stages.checks.inputs import CrossTokenizerInputs, build_cross_tokenizer_inputs
from potstill.stages.checks.report import FAIL, NOTE, Check, CheckFailed
from potstill.stages.dataset import prepare_dataset
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.module import build_module
from potstill.stages.distill.run import distill
from potstill.stages.doctor import Doctor
from potstill.stages.model_pair import ModelPair
from potstill.train.config import TrainConfig

__all__ = ["foreign"]

ACROSS = ObjectiveConfig(name="dskdv2_eta")
LINES = [f"The quick brown Fox {i} jumps over the lazy dog.\nNaïve 世界 {i} don't  mind 🎉." for i in range(40)]
TOKENIZERS = {
    "older SentencePiece": lambda: sentencepiece(scheme="always"),
    "Gemma's": lambda: sentencepiece(scheme="never"),
}


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Text with letters of every width."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def speaking(tokenizer: PreTrainedTokenizerFast, *, seed: int, width: int = 32, padded: int = 0) -> GPT2LMHeadModel:
    """A random model with dropout, whose head has `padded` rows too many."""
    torch.manual_seed(seed)
    size = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + padded, **size, **ENDS)).eval()


def crossing(
    text: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    teacher: PreTrainedModel | None = None,
    objective: ObjectiveConfig = ACROSS,
    compute: torch.dtype = torch.float32,
    ids: dict[str, int] | None = None,
) -> CrossTokenizerInputs:
    """A student of bytes under a teacher that speaks otherwise; `ids` takes another number of ids for the real one."""
    own = byte_level()
    prepared = prepare_dataset(DatasetConfig(data=str(text), context=64), own, tokens=512, documents=2)
    other = (speaking(tokenizer, seed=1, width=48) if teacher is None else teacher).to(compute)
    origin, loaded = (
        LoadedModel(model=model, tokenizer=speech, name=name, path=text, digest="", license=None)
        for name, model, speech in (("student", speaking(own, seed=2), own), ("teacher", other, tokenizer))
    )
    pair = ModelPair(
        origin.model,
        origin,
        {"teacher": loaded},
        len(own),
        [],
        {},
        is_cross_tokenizer=True,
        needs_edit_alignment=objective.needs_edit_alignment,
    )
    study = build_module(DistillConfig(teacher="t", student="s", objective=objective), pair, compute)
    if ids is not None:
        study.vocabulary = ids
    return build_cross_tokenizer_inputs(pair, prepared.packs, study, kind="text")


def ill(found: CrossTokenizerInputs) -> list[str]:
    return failed(list(run_cross_tokenizer_checks(found)))


def named(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.mark.parametrize(("tokenizer", "compute"), [("older SentencePiece", "float32"), ("Gemma's", "bfloat16")])
def test_an_honest_pair_is_well(tokenizer: str, compute: str, lines: Path) -> None:
    found = list(run_cross_tokenizer_checks(crossing(lines, TOKENIZERS[tokenizer](), compute=getattr(torch, compute))))
    assert not failed(found), [check.to_dict() for check in found]
    assert len(found) == 14  # no chat: six of both readings, five of the student and three of the teacher
    assert named(found)["aligned tokens"].outcome == NOTE


@pytest.mark.parametrize("name", ["dskd_cma", "uld", "mined", "spans", "hidden"])
def test_every_objective_across_is_examined(name: str, lines: Path) -> None:
    assert not ill(crossing(lines, sentencepiece(), objective=ObjectiveConfig(name=name)))


def test_a_teacher_whose_tokenizer_loses_text_is_found_and_has_few_aligned_tokens(lines: Path) -> None:
    found = list(run_cross_tokenizer_checks(crossing(lines, unigram(rewrites=True)), quick=True))
    assert failed(found) == ["same text"]
    assert "Fox" in named(found)["same text"].found
    assert named(found)["aligned tokens"].outcome == NOTE


@pytest.mark.parametrize(("name", "which"), [("match_spans", "tokens"), ("merge_spans", "runs")])
def test_an_alignment_that_is_off_by_one_is_found(
    name: str, which: str, lines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(align, name)

    def moved(first: Tensor, second: Tensor) -> Any:
        found = right(first, second)
        if which == "tokens":
            return (found + torch.tensor([0, 1]))[:-1]
        return found._replace(second=found.second.roll(1))

    monkeypatch.setattr(align, name, moved)
    found = ill(crossing(lines, sentencepiece()))
    assert found == (["aligned bytes", "self alignment"] if which == "tokens" else ["aligned bytes"])


def test_a_teacher_that_stays_in_train_mode_is_found(lines: Path) -> None:
    found = crossing(lines, sentencepiece())
    found.teacher.student.train()
    assert not ill(found)  # it has dropout, and an eval() that works
    found.teacher.student.train()
    found.teacher.student.eval = lambda: found.teacher.student  # type: ignore[method-assign]
    assert {"deterministic teacher", "loss matches reference (teacher)"} <= set(ill(found))


def test_a_padded_vocabulary_of_the_teacher_that_is_not_cut_is_found(lines: Path) -> None:
    tokenizer, uld = sentencepiece(), ObjectiveConfig(name="uld")
    padded = speaking(tokenizer, seed=1, padded=60)
    assert not ill(crossing(lines, tokenizer, teacher=padded, objective=uld))
    ids = {"student": len(byte_level()), "teacher": len(tokenizer) + 60}
    found = ill(crossing(lines, tokenizer, teacher=padded, objective=uld, ids=ids))
    assert found == ["loss matches reference (teacher)"]


def test_a_soft_cap_of_the_teacher_that_is_ignored_is_found(lines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    tokenizer = sentencepiece()
    size = {**SIZES, "vocab_size": len(tokenizer)}
    capped = Gemma2ForCausalLM(Gemma2Config(**size, **HEADS, **ENDS, final_logit_softcapping=3.0)).eval()
    assert not ill(crossing(lines, tokenizer, teacher=capped))
    whole = reading.get_head
    monkeypatch.setattr(reading, "get_head", lambda model: whole(model)._replace(softcap=None))
    assert "loss matches reference (teacher)" in ill(crossing(lines, tokenizer, teacher=copy.deepcopy(capped)))


def test_answers_that_do_not_end_for_the_teacher_are_found_and_matter_where_nothing_else_ends_them(
    teacher: Path, foreign: Path, pairs: Path
) -> None:
    (foreign / "chat_template.jinja").unlink()
    config = json.loads((foreign / "tokenizer_config.json").read_text())
    (foreign / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    doctor = Doctor(teacher=str(foreign), student=str(teacher), data=str(pairs), context=64, objective=ACROSS)
    for share, outcome in ((0.7, NOTE), (0.0, FAIL)):
        found = replace(doctor, objective=replace(ACROSS, cross_entropy=share)).run()
        assert named(found)["teacher stop token"].outcome == outcome


def test_a_token_by_token_objective_is_refused_with_the_command_that_works(
    teacher: Path, foreign: Path, text: Path
) -> None:
    doctor = Doctor(teacher=str(foreign), student=str(teacher), data=str(text), context=64, dtype="float32")
    (check,) = doctor.run()
    assert (check.name, check.outcome) == ("shared vocabulary", FAIL)
    assert check.remedy.endswith(
        f"potstill doctor --teacher {foreign} --student {teacher} --data {text} --objective dskdv2_eta"
    )
    found = named(replace(doctor, objective=ACROSS).run())
    assert found["aligned tokens"].found == "100.0% of the trained tokens"
    assert not failed(list(found.values()))
    with pytest.raises(UsageError, match="omit --teacher-cache"):
        replace(doctor, objective=ACROSS, teacher_cache="somewhere").run()


def test_distill_asks_the_quick_ones_first_warns_of_few_aligned_tokens_and_refuses_what_fails(
    teacher: Path,
    foreign: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = DistillConfig(
        teacher=str(foreign),
        student=str(teacher),
        data=str(text),
        objective=ACROSS,
        settings=TrainConfig(tokens=256, context=64, batch_tokens=128, micro_tokens=64),
        dtype="float32",
        documents=2,
    )
    run = distill(stage, tmp_path / "made", show=False)
    names = [one["name"] for one in run.card.invariants]
    assert names[:4] == ["same text", "aligned tokens", "aligned bytes", "self alignment"]
    assert {"loss matches reference (student)", "loss matches reference (teacher)"} <= set(names)
    assert "aligned tokens" not in capsys.readouterr().err
    whole = align.match_spans
    monkeypatch.setattr(align, "match_spans", lambda a, b: whole(a, b)[::2])
    with pytest.raises(CheckFailed, match="self alignment"):
        distill(stage, tmp_path / "half", show=False)
    assert "note: aligned tokens: 49.4%" in capsys.readouterr().err
    monkeypatch.setattr(align, "match_spans", lambda a, b: align.match_starts(a, b)[:-1] + torch.tensor([0, 1]))
    with pytest.raises(CheckFailed, match="aligned bytes"):
        distill(stage, tmp_path / "other", show=False)
    assert not (tmp_path / "other" / "config.json").exists()
