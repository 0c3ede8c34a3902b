"""Plans of the small world: what they hold, that they leave nothing, and that what they advise helps."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.test_measure import foreign
from transformers import LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from potstill.core.errors import ArtifactError, UsageError, VocabularyMismatch
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.registry import read_blueprint
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.plan.plan import Plan
from potstill.stages.resources.activation_memory import measure_autograd_bytes
from potstill.stages.resources.calibration import SAMPLING, Calibration, StepMeasurements, fit_calibration
from potstill.stages.resources.dataset_stats import PackingStats
from potstill.stages.resources.estimate import estimate
from potstill.stages.resources.layer_timing import LayerTimings, Rate, measure_layer_timings
from potstill.stages.resources.profiling import MEASURED_STEPS, WARM_UP_STEPS, StepTimer, estimate_profiling_seconds
from potstill.stages.resources.workload import Workload
from potstill.train.config import TrainConfig

__all__ = ["foreign"]

SETTINGS = TrainConfig(tokens=2048, context=256, batch_tokens=1024, micro_tokens=512, save_every=1)
RATES = Calibration(
    measured=True,
    teacher=1.0,
    student=1.1,
    backward=1.2,
    optimizer=1e-9,
    loss={"live": 1e-8},
    overhead=1e8,
)
RATE = Rate(per_operation=2e-11, fixed=1e-9)
PACE = LayerTimings(
    teacher=RATE, student=RATE, backward=RATE, head=1e-11, embedding_and_head=(1e-3, 2e-3), clipping=1e-9
)


@pytest.fixture
def stage(teacher: Path, text: Path) -> DistillConfig:
    return DistillConfig(teacher=str(teacher), keep=0.755, data=str(text), settings=SETTINGS, dtype="float32")


@pytest.fixture
def made(stage: DistillConfig) -> dict[str, Any]:
    return Plan(distill=stage, calibration=RATES).run()


@pytest.fixture
def work(tiny_llama: LlamaForCausalLM) -> Workload:
    blueprint, text = read_blueprint(tiny_llama.config), PackingStats(fill=1.0, trained=0.5, seen=16.0)
    return Workload(teacher=blueprint, student=blueprint, vocabulary=259, settings=SETTINGS, packing=text)


def test_a_plan_is_one_document_with_every_part(made: dict[str, Any], stage: DistillConfig) -> None:
    assert json.loads(json.dumps(made)) == made
    assert made["stage"] == stage.to_dict()
    assert made["parameters"]["share"] == pytest.approx(0.755, rel=0.02)
    assert made["memory"]["peak"] == max(made["phases"].values())
    assert made["phases"]["training"] == sum(size for name, size in made["memory"].items() if name != "peak")
    assert set(made["phases"]) == {"loading", "training", "pruning"}
    parts = ["teacher forward", "student forward", "backward", "head and loss"]
    assert list(made["flops_per_token"]) == [*parts, "total"]
    assert list(made["time"]["parts"]) == [*parts, "optimizer"]
    assert made["time"]["steps"] == 2
    states = made["state_bytes"]
    assert states["teacher"] == {"token": 192, "context": 192 * 512}  # 3 layers of 2 heads of 8, keys and values, bf16
    assert states["student"]["token"] < 192
    assert made["fits"] == {"memory": True, "disk": True}
    assert made["capacity_gap"]["teacher_for_student"] is None  # of 24 thousand parameters


def test_every_suggestion_really_lowers_what_is_needed(stage: DistillConfig) -> None:
    made = Plan(distill=replace(stage, keep=None, student=stage.teacher), calibration=RATES).run()
    changes = made["suggestions"]
    named = " ".join(one["change"] for one in changes)
    options = ("--micro-tokens 256", "--context 128", "--checkpoint-activations", "--lora 16", "--teacher-cache")
    assert all(option in named for option in options)
    for one in changes:
        assert one["memory"] < made["memory"]["peak"] or one["disk"] < made["disk"]["most"]
    assert [one["memory"] for one in changes] == sorted(one["memory"] for one in changes)


def test_a_suggestion_is_what_a_plan_of_it_says(stage: DistillConfig) -> None:
    own = replace(stage, keep=None, student=stage.teacher)
    (found,) = [s for s in Plan(distill=own, calibration=RATES).run()["suggestions"] if s["change"] == "--lora 16"]
    planned = Plan(distill=replace(own, lora=16), calibration=RATES).run()
    assert (found["memory"], found["disk"]) == (planned["memory"]["peak"], planned["disk"]["most"])


@pytest.mark.parametrize("name", ["measured", "assumed"])
def test_planning_leaves_no_file_behind(stage: DistillConfig, tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    made = Plan(distill=stage, measure=name == "measured").run(tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert made["calibration"]["measured"] == (name == "measured")
    assert made["time"]["seconds_per_step"] > 0
    assert ("plan ran no step" in made["notes"][0]) == (name == "assumed")


def test_measured_rates_give_back_the_time_and_memory_that_were_measured(work: Workload) -> None:
    seconds = {"teacher": 1.0, "student": 2.0, "loss": 3.0, "backward": 4.0, "optimizer": 0.5}
    tokens, rows = work.tokens * work.passes, work.rows * work.passes
    saved = measure_autograd_bytes(work.student, dtype=torch.bfloat16)
    held = sum(work.memory_bytes(saved).values())
    rates = fit_calibration(
        StepMeasurements(seconds=seconds, tokens=tokens, rows=rows, peak=1e9), work, PACE, tensor_bytes=held
    )
    again = estimate(work, saved, PACE, rates, tokenizer_bytes=0)
    assert again.seconds_per_step == pytest.approx(10.5)
    assert again.peak == pytest.approx(1e9)


def test_what_takes_no_longer_than_its_products_alone_is_not_below_nothing(work: Workload) -> None:
    seconds = {"student": 2.0, "loss": 1e-9, "backward": 1e-9, "optimizer": 0.5}
    seen = StepMeasurements(seconds=seconds, tokens=work.tokens, rows=work.rows, peak=1e9)
    rates = fit_calibration(seen, work, PACE, tensor_bytes=0.0)
    assert (rates.backward, dict(rates.loss), rates.teacher) == (0.0, {"live": 0.0}, 1.0)


def test_a_pass_of_fewer_tokens_takes_longer_for_each(work: Workload) -> None:
    """Twice the passes of half the tokens: the layers' and the tables' fixed parts come twice."""
    halved = replace(work, settings=replace(SETTINGS, micro_tokens=256))
    seconds, more = (RATES.step_seconds(one, PACE) for one in (work, halved))
    assert sum(more.values()) > sum(seconds.values())
    flops, tokens = work.flops()["backward"], work.tokens * work.passes
    layers = flops * tokens * RATES.backward * (RATE.seconds_at(halved.tokens) - RATE.seconds_at(work.tokens))
    assert more["backward"] - seconds["backward"] == pytest.approx(layers + 2 * PACE.embedding_and_head[1])
    assert more["head and loss"] - seconds["head and loss"] == pytest.approx(2 * PACE.embedding_and_head[0])


def test_every_network_is_asked_itself(work: Workload) -> None:
    wide = Attention(heads=8, kv_heads=8, head_dim=64)
    layer = replace(work.student.layers[0], mixer=wide, ffn=SwiGLU(1024))
    other = replace(work, student=replace(work.student, hidden=512, layers=(layer,) * 2))
    narrow, broad = (measure_layer_timings(one, torch.device("cpu")) for one in (work, other))
    assert narrow.teacher == broad.teacher
    assert narrow.student.seconds_at(64.0) > broad.student.seconds_at(
        64.0
    )  # an operation of a narrow network takes longer
    assert measure_layer_timings(replace(work, source="alone"), torch.device("cpu")).teacher == Rate(0.0, 0.0)
    assert min(broad.embedding_and_head) > 0 < broad.clipping


def test_a_median_forgets_a_step_that_was_disturbed() -> None:
    steps = [{"loss": seconds, "tokens": 9.0, "rows": 4.0} for seconds in (1.0, 1.2, 60.0)]
    seen = StepMeasurements.from_steps(steps, peak=1.0)
    assert (dict(seen.seconds), seen.tokens, seen.rows) == ({"loss": 1.2}, 9.0, 4.0)


def test_the_loss_of_a_source_that_was_not_measured_is_guessed_in_order() -> None:
    assert RATES.loss_rate("alone") < RATES.loss_rate("cached") < RATES.loss_rate("live")


def test_a_calibration_survives_json_and_another_document_is_refused() -> None:
    assert Calibration.from_dict(json.loads(json.dumps(RATES.to_dict()))) == RATES
    with pytest.raises(ArtifactError, match="a calibration has the keys backward"):
        Calibration.from_dict({"student": 1.0})


def test_more_of_anything_never_takes_less(work: Workload) -> None:
    saved = measure_autograd_bytes(work.student, dtype=torch.bfloat16)

    def needed(one: Workload) -> tuple[float, float]:
        made = estimate(one, saved, PACE, RATES, tokenizer_bytes=0)
        return made.peak, made.seconds_per_step

    for more in (
        replace(work, settings=replace(SETTINGS, batch_tokens=2048)),
        replace(work, packing=work.packing._replace(trained=1.0)),
        replace(work, compute_bytes=4),
    ):
        assert all(a <= b for a, b in zip(needed(work), needed(more), strict=True))


def test_blocks_computed_twice_hold_less_and_take_a_forward_more(work: Workload) -> None:
    twice = replace(work, settings=replace(SETTINGS, checkpoint_activations=True))
    saved = measure_autograd_bytes(work.student, dtype=torch.bfloat16)
    plain, other = (estimate(one, saved, PACE, RATES, tokenizer_bytes=0) for one in (work, twice))
    assert other.memory["activations"] < 0.6 * plain.memory["activations"]
    assert other.peak < plain.peak
    again = work.flops()["student forward"] * work.tokens * work.passes * RATE.seconds_at(work.tokens) * RATES.backward
    assert other.seconds_per_step - plain.seconds_per_step == pytest.approx(again)


def test_a_window_longer_than_a_model_takes_is_refused(stage: DistillConfig) -> None:
    with pytest.raises(UsageError, match="context is 1024, and one of the models takes 512"):
        Plan(distill=replace(stage, settings=replace(SETTINGS, context=1024)), calibration=RATES).run()


def test_no_teacher_in_the_loss_needs_no_cache(stage: DistillConfig) -> None:
    made = Plan(distill=replace(stage, objective=ObjectiveConfig(name="cross_entropy")), calibration=RATES).run()
    assert not any("--teacher-cache" in one["change"] for one in made["suggestions"])
    assert made["flops_per_token"]["teacher forward"] == 0


@pytest.fixture
def apart(stage: DistillConfig, foreign: Path) -> DistillConfig:
    """A student under a teacher with another tokenizer."""
    across = ObjectiveConfig(name="dskdv2_eta")
    return replace(stage, keep=None, student=stage.teacher, teacher=str(foreign), objective=across)


def test_a_teacher_with_another_tokenizer_is_planned_as_it_reads_the_text(apart: DistillConfig) -> None:
    made = Plan(distill=apart, calibration=RATES).run()
    assert json.loads(json.dumps(made)) == made
    assert made["alignment"]["aligned_share"] == 1.0  # two letters are exchanged, so all is aligned
    assert made["alignment"]["teacher_vocabulary"] == 259
    assert made["alignment"]["teacher_tokens"] >= 1.0
    assert made["parameters"]["objective"] == 32 * 32
    assert made["parameters"]["trained"] == made["parameters"]["student"]["total"] + 32 * 32
    with pytest.raises(VocabularyMismatch, match="dskdv2_eta"):
        Plan(distill=replace(apart, objective=ObjectiveConfig()), calibration=RATES).run()
    alone = Plan(distill=replace(apart, objective=ObjectiveConfig(name="cross_entropy")), calibration=RATES).run()
    assert alone["alignment"] is None


def test_steps_of_two_tokenizers_are_measured(apart: DistillConfig) -> None:
    made = Plan(distill=replace(apart, settings=replace(SETTINGS, tokens=512))).run()
    assert made["calibration"]["measured"]
    assert made["calibration"]["teacher"] > 0
    assert "steps of 1024 tokens were measured" in made["notes"]
    assert any("of dskdv2_eta products with both heads" in note for note in made["notes"])


@pytest.mark.parametrize(("step", "seconds"), [(0.5, 4.0), (4.0, 28.0), (5.0, 30.0), (10.0, 60.0)])
def test_short_steps_are_measured_five_times_and_long_ones_for_fifteen_seconds(step: float, seconds: float) -> None:
    assert estimate_profiling_seconds(step) == seconds
    clock, control, ran = StepTimer([], torch.device("cpu")), TrainerControl(), 0
    while not control.should_training_stop and ran < WARM_UP_STEPS + MEASURED_STEPS:
        clock._start_times["step"] = time.perf_counter() - step
        clock.on_step_end(TrainingArguments(), TrainerState(), control)
        ran += 1
    assert ran * step == seconds


def test_forwards_while_a_rollout_samples_are_no_part_of_their_own() -> None:
    timer = StepTimer([], torch.device("cpu"))
    timer.start(SAMPLING)
    timer.start("student")
    timer.stop("student")
    timer.stop(SAMPLING)
    assert [*timer._current_step] == [SAMPLING]


def test_what_a_rollout_draws_counts_for_each_step_that_trains_on_it() -> None:
    steps = [{SAMPLING: seconds, "tokens": 1.0, "rows": 1.0} for seconds in (0.1, 6.0, 0.1)]
    assert StepMeasurements.from_steps(steps, peak=0.0, draws=[9.0, 6.0, 6.0], updates=3).seconds == {SAMPLING: 2.0}


def test_no_step_begins_after_two_minutes() -> None:
    timer, control = StepTimer([], torch.device("cpu")), TrainerControl()
    for stops in (False, True):
        timer._start_times["step"] = time.perf_counter() - 61.0
        timer.on_step_end(TrainingArguments(), TrainerState(), control)
        assert control.should_training_stop == stops


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["forward_kl", "dskd", pytest.param("dskdv2", marks=SLOW), pytest.param("tie_kd", marks=SLOW)]
)
def test_steps_from_a_cache_are_measured(name: str, stage: DistillConfig, tmp_path: Path) -> None:
    cache, settings = tmp_path / "cache", replace(SETTINGS, tokens=512)
    own = {"teacher": stage.teacher, "data": stage.data, "context": settings.context, "dtype": "float32"}
    CacheTeacherConfig(**own, top_k=8, hidden=True).run(cache, show=False)  # type: ignore[arg-type]
    cached = replace(stage, teacher_cache=str(cache), settings=settings, objective=ObjectiveConfig(name=name))
    made = Plan(distill=cached).run()
    assert made["calibration"]["measured"]
    assert made["calibration"]["loss"].keys() == {"cached"}
    assert made["time"]["seconds_per_step"] > 0


def test_few_aligned_tokens_are_said(apart: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potstill.ops.align.match_spans", lambda a, b: torch.empty(0, 2, dtype=torch.long))
    made = Plan(distill=apart, calibration=RATES).run()
    assert made["alignment"]["aligned_share"] == 0
    assert any(note.startswith("0.0% of the trained tokens are aligned") for note in made["notes"])


@pytest.mark.parametrize(("name", "served"), [("relations", False), ("dskd", True)])
def test_a_cache_is_suggested_to_a_method_that_it_can_serve(name: str, served: bool, stage: DistillConfig) -> None:
    made = Plan(distill=replace(stage, objective=ObjectiveConfig(name=name)), calibration=RATES).run()
    offered = [one["change"] for one in made["suggestions"] if one["change"].startswith("--teacher-cache")]
    assert offered == ["--teacher-cache CACHE, made before with potstill cache --hidden"] * served
    assert made["parameters"]["objective"] > 0
    assert made["alignment"] is None
