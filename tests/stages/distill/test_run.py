"""Distil from end to end: the folder, its card, and how a run is stopped, continued and made again."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.stages.world import LINES, interrupted, saved, written
from tests.tiny import byte_tokenizer, random_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.card import Card, Parent
from potstill.core.errors import Interrupted, MissingDependency, OutputExists, UsageError, VocabularyMismatch
from potstill.models.load import compute_digest
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.front_matter import format_front_matter
from potstill.stages.plan.plan import Plan
from potstill.stages.run_models import choose_dtype
from potstill.stages.run_record import RunRecord
from potstill.stages.training import TrainingResult
from potstill.train.config import TrainConfig

SETTINGS = TrainConfig(tokens=512, context=64, batch_tokens=128, micro_tokens=64, save_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the teacher, its text, and the run that most tests look at."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    return saved(folder / "teacher", random_llama(byte_tokenizer(), context=512), byte_tokenizer())


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    return written(folder / "text.jsonl", LINES)


@pytest.fixture(scope="module")
def stage(teacher: Path, text: Path) -> DistillConfig:
    return DistillConfig(
        teacher=str(teacher), keep=0.755, data=str(text), settings=SETTINGS, dtype="float32", documents=2
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def run(stage: DistillConfig, folder: Path) -> TrainingResult:
    return distill(stage, folder / "made", show=False)


def test_the_folder_holds_the_model_and_its_papers_and_nothing_else(run: TrainingResult) -> None:
    assert {file.name for file in run.out.iterdir()} == {
        *("README.md", "card.json", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "metrics.jsonl", "curve.png"),
    }
    assert not list(run.out.parent.glob(".made*"))
    assert (run.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    opened = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(opened(ids).logits, run.model(ids).logits, atol=1e-5)


def test_epochs_follow_from_the_text_and_the_card_and_a_resumed_run_know_them(
    stage: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = replace(stage, settings=replace(SETTINGS, tokens=None, epochs=1.0))
    planned = Plan(distill=stage, measure=False).run()
    with interrupted(tmp_path / "made"), pytest.raises(Interrupted):
        distill(stage, tmp_path / "made", show=False)
    for other, change in (
        ({"epochs": 2.0}, "epochs 1.0, and now it is 2.0"),
        ({"epochs": None}, "tokens None, and now"),
    ):
        changed = replace(stage.settings, **other)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=change):
            distill(replace(stage, settings=changed), tmp_path / "made", resume=True, show=False)
    card = distill(stage, tmp_path / "made", resume=True, show=False).card
    assert (card.stage["settings"]["tokens"], card.stage["settings"]["epochs"]) == (None, 1.0)
    assert card.cost["tokens"] == card.data["tokens"] == planned["text"]["tokens"]
    assert card.cost["steps"] == planned["time"]["steps"]
    assert planned["stage"] == card.stage
    assert "were asked for" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dskd:divergence=reverse_kl", "dskdv2", "hidden:map=0-1/2-3", "relations"])
def test_an_objectives_own_weights_do_not_ship(
    name: str, run: TrainingResult, stage: DistillConfig, tmp_path: Path
) -> None:
    settings, mixture = replace(SETTINGS, tokens=128), ObjectiveConfig.parse(name, cross_entropy=0.5, temperature=1.0)
    other = distill(replace(stage, settings=settings, objective=mixture), tmp_path / "other", show=False)
    assert {file.name for file in other.out.iterdir()} == {file.name for file in run.out.iterdir()}
    assert {key: value.shape for key, value in weights(other.out).items()} == {
        key: value.shape for key, value in weights(run.out).items()
    }


def test_the_card_says_what_was_done(run: TrainingResult, stage: DistillConfig, teacher: Path) -> None:
    card = json.loads((run.out / "card.json").read_text())
    assert card == json.loads(json.dumps(run.card.to_dict()))
    assert card["stage"] == stage.to_dict()
    (parent,) = card["parents"]
    assert (parent["name"], parent["licence"], parent["digest"]) == (
        str(teacher),
        "apache-2.0",
        compute_digest(teacher),
    )
    assert card["seed"] == 1
    assert {"python", "torch", "transformers", "potstill"} <= set(card["versions"])
    assert len(card["data"]["text_digest"]) == len(card["data"]["measured_digest"]) == 64
    assert card["data"]["measured_on"].endswith("2 documents")
    assert card["cost"]["tokens"] <= 512
    assert set(card["cost"]["losses"]) == {"cross_entropy", "forward_kl"}
    checked = {one["name"]: one["outcome"] for one in card["invariants"]}
    quick = ["shared vocabulary", "LM head reproduced", "packing isolation", "loss matches reference"]
    assert list(checked) == [*quick, "logits after reload"]
    assert all(checked[name].startswith("pass: ") for name in quick)
    assert "## Checks" in (run.out / "README.md").read_text()
    assert list(card["measures"]) == ["teacher", "before training", "made"]
    for name in ("bits_per_byte", "teacher_kl", "teacher_agreement"):
        found = next(m for m in card["measures"]["made"] if m["name"] == name)
        assert found["low"] <= found["value"] <= found["high"]
    parameters = {
        name: next(m["value"] for m in card["measures"][name] if m["name"] == "parameters")
        for name in ("teacher", "made")
    }
    assert parameters["made"] / parameters["teacher"] == pytest.approx(0.755, rel=0.02)


def test_the_readme_tells_a_stranger_what_it_is(run: TrainingResult, teacher: Path) -> None:
    _, front, body = (run.out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    for fact in (
        "`teacher` pruned to 75.5% of its parameters",
        "70% cross-entropy and 30% forward kl to `teacher`",
        "license: apache-2.0",
        "| made | ",
        "![The terms of the loss over the tokens seen](curve.png)",
        "What is a pot still?",
        "Seed 1",
        'AutoModelForCausalLM.from_pretrained("made", dtype="auto")',
    ):
        assert fact in body
    assert "None" not in body
    assert str(teacher.parent) not in body


def test_the_baseline_is_the_student_that_training_begins_with(stage: DistillConfig, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=128, learning_rate=1e-12)
    run = distill(replace(stage, settings=settings, save_dtype="float32"), tmp_path / "made", show=False)
    before, after = run.measures["before training"], run.measures["made"]
    assert [m.value for m in before] == pytest.approx([m.value for m in after[: len(before)]], rel=1e-4)
    assert {m.name for m in before} >= {"bits_per_byte", "teacher_kl", "teacher_agreement"}


def test_parents_under_different_licences_give_the_student_none() -> None:
    parents = [Parent(role=role, name=role, digest="0", licence=said) for role, said in (("a", "mit"), ("b", None))]
    for chosen, licence in ((parents[:1], "mit"), (parents, None), ([*parents[:1], *parents[:1]], "mit")):
        front = format_front_matter(Card(stage={}, seed=1, parents=chosen)).strip("-")
        assert yaml.safe_load(front).get("license") == licence


def test_training_teaches(stage: DistillConfig, tmp_path: Path) -> None:
    settings = replace(SETTINGS, tokens=2048, learning_rate=3e-3, save_every=0)
    losses = []
    for name, s in (("short", replace(settings, tokens=128)), ("long", settings)):
        found = distill(
            replace(stage, settings=s, objective=ObjectiveConfig(cross_entropy=0.0)), tmp_path / name, show=False
        ).measures[name]
        losses.append(next(m.value for m in found if m.name == "teacher_kl"))
    assert losses[1] < 0.8 * losses[0]


def test_a_stopped_run_continues_to_the_same_weights(stage: DistillConfig, run: TrainingResult, tmp_path: Path) -> None:
    again = tmp_path / "again"
    with interrupted(again), pytest.raises(Interrupted, match="--resume"):
        distill(stage, again, show=False)
    assert {file.name for file in again.iterdir()} == {"training"}
    with pytest.raises(OutputExists, match="--resume"):
        distill(stage, again, show=False)
    resumed = distill(stage, again, resume=True, show=False)
    assert not (again / "training").exists()
    assert same(run.out, again)
    assert resumed.measures["before training"] == run.measures["before training"]
    lines = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_a_stopped_run_may_go_on_with_its_blocks_computed_twice(
    stage: DistillConfig, run: TrainingResult, tmp_path: Path
) -> None:
    with interrupted(tmp_path / "again"), pytest.raises(Interrupted):
        distill(stage, tmp_path / "again", show=False)
    twice = replace(stage, settings=replace(SETTINGS, checkpoint_activations=True))
    resumed = distill(twice, tmp_path / "again", resume=True, show=False)
    assert resumed.card.stage["settings"]["checkpoint_activations"]
    assert same(run.out, tmp_path / "again")


@pytest.mark.slow
def test_a_compiler_that_fails_is_named_in_one_line_and_the_run_is_what_it_is_without(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    given = {"teacher": teacher, "keep": 0.755, "data": text, "dtype": "float32", "documents": 2}
    given |= {"tokens": 512, "context": 64, "batch-tokens": 128, "micro-tokens": 64}
    options = [f"--{name}={value}" for name, value in given.items()]
    failing = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        call = [sys.executable, "-m", "potstill", "distill", *options, f"--out={tmp_path / name}", *more]
        path = os.pathsep.join(filter(None, sys.path))
        ran = subprocess.run(
            call, env=os.environ | failing | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        lines = [line for line in ran.stderr.splitlines() if "torch" in line or "Traceback" in line]
        assert [line[:34] for line in lines] == ["note: torch.compile fails here (In"] * len(more)
    assert same(tmp_path / "plain", tmp_path / "compiled")


def test_a_run_that_was_stopped_after_training_only_finishes(
    stage: DistillConfig, run: TrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("potstill.stages.publication.write_card", stop)
        with pytest.raises(Interrupted):
            distill(stage, tmp_path / "again", show=False)
    assert not (tmp_path / "again" / "config.json").exists()
    assert not list(tmp_path.glob(".again*"))
    distill(stage, tmp_path / "again", resume=True, show=False)
    assert same(run.out, tmp_path / "again")


def test_equal_seeds_give_equal_weights_and_other_seeds_others(
    stage: DistillConfig, run: TrainingResult, tmp_path: Path
) -> None:
    distill(stage, tmp_path / "again", show=False)
    assert same(run.out, tmp_path / "again")
    distill(replace(stage, settings=replace(SETTINGS, seed=2)), tmp_path / "other", show=False)
    assert not same(run.out, tmp_path / "other")


def test_overwriting_replaces_the_folder_whole(stage: DistillConfig, run: TrainingResult, tmp_path: Path) -> None:
    out = shutil.copytree(run.out, tmp_path / "made")
    (out / "stray.txt").write_text("old")
    with pytest.raises(OutputExists, match="--overwrite"):
        distill(stage, out, show=False)
    distill(stage, out, overwrite=True, show=False)
    assert not (out / "stray.txt").exists()
    assert same(run.out, out)


def test_what_is_overwritten_stays_if_the_new_run_fails(
    stage: DistillConfig, run: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compute_digest(run.out)
    monkeypatch.setattr("potstill.stages.training.train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill(stage, run.out, overwrite=True, show=False)
    assert compute_digest(run.out) == before
    assert not (run.out / "training").exists()


def test_a_resumed_run_multiplies_in_what_it_began_with(stage: DistillConfig, tmp_path: Path) -> None:
    auto = replace(stage, dtype="auto")
    for name in ("bfloat16", "float32"):
        (tmp_path / name / "training").mkdir(parents=True)
        RunRecord(options={}, origins={"dtype": name}).write(tmp_path / name / "training")
        assert choose_dtype(auto, {}, resume_folder=tmp_path / name) == getattr(torch, name)


def test_a_student_of_its_own(
    stage: DistillConfig,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    teacher: Path,
    tmp_path: Path,
) -> None:
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.mul_(0.5)
    student = saved(tmp_path / "student", tiny_llama, tiny_tokenizer)
    run = distill(replace(stage, keep=None, student=str(student)), tmp_path / "made", show=False)
    assert [(p.role, p.name, p.digest) for p in run.card.parents] == [
        ("student", str(student), compute_digest(student)),
        ("teacher", str(teacher), compute_digest(teacher)),
    ]
    assert "`student`, trained on" in (run.out / "README.md").read_text()


def test_lora_trains_little_and_ships_a_stock_model(stage: DistillConfig, teacher: Path, tmp_path: Path) -> None:
    run = distill(replace(stage, lora=2, save_dtype="float32"), tmp_path / "made", show=False)
    made = AutoModelForCausalLM.from_pretrained(run.out)
    assert type(made).__name__ == "LlamaForCausalLM"
    assert not list(run.out.glob("adapter*"))
    assert not any("lora" in name for name in weights(run.out))
    assert "adapters (LoRA) of rank 2" in (run.out / "README.md").read_text()
    old = AutoModelForCausalLM.from_pretrained(teacher)
    assert torch.equal(made.model.embed_tokens.weight, old.model.embed_tokens.weight)
    layer = run.card.details["kept_layers"][0]
    assert not torch.equal(made.model.layers[0].mlp.up_proj.weight, old.model.layers[layer].mlp.up_proj.weight)


def test_only_the_named_parameters_are_trained(stage: DistillConfig, teacher: Path, tmp_path: Path) -> None:
    stage = replace(stage, keep=None, student=str(teacher), train=r"mlp\.down", save_dtype="float32")
    run = distill(stage, tmp_path / "made", show=False)
    old, new = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (teacher, run.out))
    assert {name for name in old if not torch.equal(old[name], new[name])} == {n for n in old if "mlp.down" in n}
    assert "only parameters named `mlp\\.down`" in (run.out / "README.md").read_text()


def test_a_stopped_lora_run_continues_to_the_same_weights(stage: DistillConfig, tmp_path: Path) -> None:
    stage = replace(stage, lora=2)
    distill(stage, tmp_path / "made", show=False)
    with interrupted(tmp_path / "again"), pytest.raises(Interrupted):
        distill(stage, tmp_path / "again", show=False)
    distill(stage, tmp_path / "again", resume=True, show=False)
    assert same(tmp_path / "made", tmp_path / "again")


def test_fine_tuning_on_answers_alone(stage: DistillConfig, teacher: Path, pairs: Path, tmp_path: Path) -> None:
    sft = replace(
        stage, keep=None, student=str(teacher), data=str(pairs), objective=ObjectiveConfig(name="cross_entropy")
    )
    run = distill(sft, tmp_path / "made", show=False)
    assert run.card.data["kind"] == "pairs"
    assert run.card.data["trained_share"] < 0.5
    assert set(run.card.cost["losses"]) == {"cross_entropy"}
    assert "cross-entropy alone, without a teacher" in (run.out / "README.md").read_text()


def test_a_file_that_is_held_out_is_measured_on_whole(stage: DistillConfig, tmp_path: Path) -> None:
    held_out = written(tmp_path / "held.jsonl", [{"text": f"number {i} is held out"} for i in range(9)])
    run = distill(replace(stage, eval_data=str(held_out), documents=50), tmp_path / "made", show=False)
    assert run.card.data["measured_on"].startswith(str(held_out))
    assert run.card.data["measured_on"].endswith("9 documents")


def test_evaluations_on_the_way_stand_in_the_metrics(stage: DistillConfig, tmp_path: Path) -> None:
    run = distill(replace(stage, settings=replace(SETTINGS, eval_every=2)), tmp_path / "made", show=False)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_forward_kl" in line] == [2, 4]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.stages.preflight.find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"trackio is not installed; run: pip install 'potstill\[trackers\]'"):
        DistillConfig(teacher="t", keep=0.5, settings=TrainConfig(report_to=("trackio",)))


def test_text_with_a_token_that_the_teacher_lacks_is_refused_before_training(
    stage: DistillConfig,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    teacher: Path,
    pairs: Path,
    tmp_path: Path,
) -> None:
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("<|im_end|>", "<|turn|>")
    tiny_llama.resize_token_embeddings(len(tiny_tokenizer), mean_resizing=False)
    student = saved(tmp_path / "student", tiny_llama, tiny_tokenizer)
    with pytest.raises(VocabularyMismatch, match=r"<\|turn\|>.*which the teacher's tokenizer lacks"):
        distill(replace(stage, keep=None, student=str(student), data=str(pairs)), tmp_path / "made", show=False)
    assert not (tmp_path / "made").exists()
