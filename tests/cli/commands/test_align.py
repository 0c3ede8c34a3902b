"""`potstill align`, and the commands that know its jobs, as a shell calls them."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Call
from tests.stages.world import written

TINY = ("--tokens", 256, "--context", 128, "--batch-tokens", 256, "--dtype", "float32")


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    """Sixty questions, each with a chosen and a rejected answer."""
    rows = [{"prompt": f"Is {i} odd?", "chosen": "Yes." if i % 2 else "No.", "rejected": f"{i}?"} for i in range(60)]
    return written(tmp_path / "preferences.jsonl", rows)


def test_a_run_a_measurement_and_its_cache_read_the_same_preferences(
    potstill: Call, teacher: Path, preferences: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "made", tmp_path / "cache"
    context = ("--context", 128, "--dtype", "float32")
    written_cache = potstill("cache", teacher, "--own", "--data", preferences, "--out", cache, *context, "--json")
    assert json.loads(written_cache.out)["kept"] == "log-probabilities"
    answer = potstill("align", teacher, "--data", preferences, "--reference-cache", cache, "--out", out, *TINY)
    assert answer.code == 0, answer.err
    assert "before training" in answer.out
    assert "the implied reward prefers the chosen answer in" in answer.err
    assert "without training, the chosen answer is the shorter one in 0.250 and the likelier one in" in answer.err
    call = ("measure", teacher, out, "--reference", teacher, "--data", preferences, "--split", "all", "--no-speed")
    report = json.loads(potstill(*call, "--dtype", "float32", "--json").out)
    assert [*report["models"]] == [str(teacher), str(out)]
    first = {measure["name"]: measure["value"] for measure in report["models"][str(teacher)]}
    assert (first["reward_accuracy"], first["reward_margin"]) == (0.5, 0.0)
    assert {entry["name"] for entry in report["paired"]} == {"reward_accuracy", "reward_margin"}
    assert report["data"]["groups"] == 60


def test_a_dry_run_a_plan_and_the_doctor_know_the_job(
    potstill: Call, teacher: Path, preferences: Path, tmp_path: Path
) -> None:
    call = ("align", teacher, "--data", preferences, "--lora", 2, "--out", tmp_path / "made", *TINY, "--dry-run")
    first = potstill(*call, "--json")
    assert first.code == 0, first.err
    report = json.loads(first.out)
    assert report["stage"]["settings"]["learning_rate"] == 5e-6
    assert report["model"]["layers"] == 3
    assert report["training"]["steps"] == 1
    assert not (tmp_path / "made").exists()
    second = potstill("align", "--config", tmp_path / "made.yaml", "--dry-run", "--json")
    assert second.code == 0, second.err
    assert json.loads(second.out)["stage"] == report["stage"]
    options = ("--student", teacher, "--objective", "dpo", "--data", preferences)
    (tmp_path / "plan.yaml").write_text("max_length: 128\nbatch_tokens: 256\n")  # the first as in TRL
    config = ("--config", tmp_path / "plan.yaml", "--tokens", 256, "--dtype", "float32")
    plan = json.loads(potstill("plan", *options, *config, "--no-measure", "--json").out)
    assert plan["stage"]["stage"] == "align"
    assert plan["stage"]["settings"]["context"] == 128
    assert plan["memory"]["peak"] > report["memory"]["peak"], "a reference of its own takes memory, an adapter off none"
    checks = potstill("doctor", *options[2:], "--teacher", teacher, "--context", 128, "--dtype", "float32", "--json")
    assert checks.code == 0, checks.err
    names = [check["name"] for check in json.loads(checks.out)["checks"]]
    assert "zero margin for a copy" in names


def test_prompts_of_a_step_are_dry_run_saved_and_planned(potstill: Call, teacher: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "sums.jsonl", [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(60)])
    options = ("--objective", "grpo", "--data", data, "--reward", "accuracy", "--samples", 4, "--max-tokens", 5)
    options += ("--prompts-per-step", 16, "--context", 64, "--micro-tokens", 128, "--dtype", "float32")
    first = json.loads(potstill("align", teacher, *options, "--out", tmp_path / "made", "--dry-run", "--json").out)
    assert first["data"]["prompts"] == 56
    assert first["training"] == {"tokens": 48 * 64, "steps": 3, "passes": 1.0, "prompts_per_step": 16}
    again = json.loads(potstill("align", "--config", tmp_path / "made.yaml", "--dry-run", "--json").out)
    assert again["stage"] == first["stage"]
    plan = json.loads(potstill("plan", "--student", teacher, *options, "--no-measure", "--json").out)
    assert (plan["training"], plan["memory"]["peak"]) == (first["training"], first["memory"]["peak"])
    refused = potstill("plan", "--student", teacher, "--teacher", teacher, "--data", data, "--prompts-per-step", 16)
    assert "error: --prompts-per-step is for --objective grpo" in refused.err


def test_the_doctor_and_a_plan_know_models_and_rewards_beside_the_data(
    potstill: Call, teacher: Path, preferences: Path, tmp_path: Path
) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def length(completions):\n    return [len(c.completion) for c in completions]\n")
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": f"{n}+1?"} for n in range(40)])
    shared = ("--context", 128, "--dtype", "float32", "--json")
    options = ("--data", prompts, "--reward", f"{rewards}:length", "--samples", 2, "--max-tokens", 4, *shared)
    checks = potstill("doctor", "--teacher", teacher, "--objective", "grpo", *options)
    assert checks.code == 0, checks.err
    assert "decoding agrees with training" in [check["name"] for check in json.loads(checks.out)["checks"]]
    call = ("plan", "--student", teacher, *options, "--epochs", 1, "--batch-tokens", 256, "--objective")
    once = json.loads(potstill(*call, "grpo", "--no-measure").out)
    twice = json.loads(potstill(*call, "grpo:updates=2").out)
    assert (once["training"]["steps"], twice["training"]["steps"]) == (18, 36)  # of 37 prompts, two a step
    assert twice["time"]["parts"]["sampling"] > 0
    pairs = ("--objective", "aligndistil", "--plus", teacher, "--minus", teacher, "--data", preferences)
    checks = potstill("doctor", "--teacher", teacher, *pairs, *shared)
    assert checks.code == 0, checks.err
    call = ("plan", "--student", teacher, *pairs, *shared, "--no-measure")
    assert json.loads(potstill(*call, "--on-policy", 0.5).out)["stage"]["on_policy"] == 0.5
    assert "error: an alignment does not read --keep; omit it" in potstill(*call, "--keep", 0.5).err
    answer = potstill("plan", "--teacher", teacher, "--data", preferences, "--reward", "accuracy")
    assert answer.code == 2
    assert "--reward is for --objective grpo; omit it" in answer.err


@pytest.mark.slow
def test_a_plan_measures_steps_with_the_forward_of_the_reference(
    potstill: Call, teacher: Path, preferences: Path
) -> None:
    call = ("plan", "--student", teacher, "--objective", "dpo", "--data", preferences, *TINY, "--json")
    report = json.loads(potstill(*call).out)
    assert report["time"]["seconds"] > 0
    assert report["time"]["parts"]["teacher"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--objective", "forward_kl"), "error: forward_kl trains on text; use potstill distill"),
        (("--samples", 1), "error: --samples is 1; answers to a prompt are compared with one another"),
        (("--objective", "aligndistil"), "give --plus and --minus"),
        (("--reward", "accuracy"), "error: --reward is for grpo"),
        (("--prompts-per-step", 8), "error: --prompts-per-step is for grpo"),
        ((), "error: no data is given; give --data"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    potstill: Call, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    data = () if not options else ("--data", "preferences.jsonl")
    answer = potstill("align", "smollm2", *data, *options, "--out", tmp_path / "made")
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1
