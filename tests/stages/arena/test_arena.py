"""The arena on small models: equal conditions, whatever stopped in between, and what is refused before it starts."""

import gc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.stages.test_measure import foreign
from tests.stages.world import interrupted
from transformers import PreTrainedModel

from potstill.core.atomic_files import ARENA_FILE
from potstill.core.errors import Interrupted, OutputExists, UsageError, VocabularyMismatch
from potstill.evaluate.significance import INCONCLUSIVE
from potstill.stages.arena.arena import Arena
from potstill.stages.arena.arm import Arm, split_arms
from potstill.stages.arena.report import TITLES
from potstill.stages.arena.runs import read_arena_state
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

__all__ = ["foreign"]

SETTINGS = TrainConfig(context=64, batch_tokens=128, save_every=1)


@pytest.fixture
def common(teacher: Path, text: Path) -> DistillConfig:
    """What the arms share: a student that is the teacher itself, so that nothing has to be pruned."""
    return DistillConfig(
        teacher=str(teacher),
        student=str(teacher),
        data=str(text),
        settings=SETTINGS,
        documents=3,
        dtype="float32",
        skip_doctor=True,
    )


@pytest.fixture
def arena(common: DistillConfig) -> Arena:
    return Arena(common=common, objectives=("cross_entropy", "reverse_kl"), tokens=384, seeds=(1,))


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def reached(found: Mapping[str, Any]) -> dict[str, Any]:
    """What each seed of each arm measures, without what the clock says."""
    return {
        seed["folder"]: {name: one["value"] for name, one in seed["measures"].items()}
        for arm in found["arms"]
        for seed in arm["seeds"]
    }


def stamps(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_equal_arms_from_one_pruned_student_come_out_equal_and_are_not_told_apart(
    arena: Arena, common: DistillConfig, tmp_path: Path
) -> None:
    twins = ("skew_kl:skew=1e-30", "skew_kl:skew=1e-31")  # both lost beside 1 in float32, to the same bits
    pruned = replace(common, student=None, keep=0.755)
    found = replace(arena, common=pruned, objectives=twins, seeds=(1, 2)).run(tmp_path / "made", show=False)
    one, other = found["arms"]
    for ours, theirs in zip(one["seeds"], other["seeds"], strict=True):
        assert losses(tmp_path / "made" / ours["folder"]) == losses(tmp_path / "made" / theirs["folder"])
        assert ours["measures"] == theirs["measures"]
        assert ours["cost"]["tokens"] == theirs["cost"]["tokens"] > 256
    first, second = (losses(tmp_path / "made" / seed["folder"]) for seed in one["seeds"])
    assert first != second
    assert {contest["verdict"] for contest in found["paired"]} == {INCONCLUSIVE}
    assert found["baselines"]["teacher"]["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert found["baselines"]["before training"]["teacher_kl"] > 0


@pytest.mark.slow
def test_neither_the_order_of_arms_nor_a_stop_in_between_changes_a_result(arena: Arena, tmp_path: Path) -> None:
    straight = arena.run(tmp_path / "straight", show=False)
    made = tmp_path / "made"
    backwards = replace(arena, objectives=arena.objectives[::-1])
    with interrupted(made / "reverse_kl-seed1"), pytest.raises(Interrupted, match=r"0 arms are finished.*--resume"):
        backwards.run(made, show=False)
    assert reached(backwards.run(made, resume=True, show=False)) == reached(straight)
    assert losses(made / "reverse_kl-seed1") == losses(tmp_path / "straight" / "reverse_kl-seed1")
    before = stamps(made)
    again = backwards.run(made, resume=True, show=False)
    assert reached(again) == reached(straight)
    assert stamps(made) == before
    assert json.loads((made / "arena.json").read_text()) == again
    assert {file.name for file in made.iterdir()} == {
        "arena.json",
        "arena.png",
        "README.md",
        "cross_entropy-seed1",
        "reverse_kl-seed1",
    }
    assert "cross_entropy" in (made / "README.md").read_text()


@pytest.mark.slow
def test_an_arena_grows_by_arms_and_seeds_but_keeps_its_conditions(arena: Arena, tmp_path: Path) -> None:
    small = replace(arena, objectives=("reverse_kl",))
    small.run(tmp_path / "made", show=False)
    before = stamps(tmp_path / "made")
    with pytest.raises(UsageError, match="begun with tokens 384, and now it is 512"):
        replace(small, tokens=512).run(tmp_path / "made", resume=True)
    with pytest.raises(UsageError, match="begun with documents 3, and now it is 4"):
        replace(small, common=replace(small.common, documents=4)).run(tmp_path / "made", resume=True)
    with pytest.raises(OutputExists, match="--overwrite"):
        small.run(tmp_path / "made")
    grown = replace(small, seeds=(1, 2)).run(tmp_path / "made", resume=True, show=False)
    assert [seed["seed"] for seed in grown["arms"][0]["seeds"]] == [1, 2]
    assert stamps(tmp_path / "made").items() > before.items()
    small.run(tmp_path / "made", overwrite=True, show=False)
    assert stamps(tmp_path / "made").keys() == before.keys()


def test_an_arena_goes_on_with_other_options_that_change_no_result(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / ARENA_FILE).write_text(json.dumps({"settled": {"tokens": {}}, "stage": arena.to_dict()}))
    otherwise = replace(arena.common, skip_doctor=False, settings=replace(SETTINGS, checkpoint_activations=True))
    assert read_arena_state(tmp_path, replace(arena, common=otherwise).to_dict()) == {"tokens": {}}
    slower = replace(arena.common, settings=replace(SETTINGS, learning_rate=1e-5))
    with pytest.raises(UsageError, match="begun with lr"):
        read_arena_state(tmp_path, replace(arena, common=slower).to_dict())


@pytest.mark.slow
def test_a_budget_of_time_gives_every_seed_of_an_arm_the_same_steps_and_is_settled_once(
    arena: Arena, tmp_path: Path
) -> None:
    timed = replace(arena, tokens=None, seconds=0.2, objectives=("cross_entropy",))
    timed.run(tmp_path / "made", show=False)
    tokens = read_arena_state(tmp_path / "made", timed.to_dict())["tokens"]
    assert tokens["cross_entropy"] >= 128
    assert tokens["cross_entropy"] % 128 == 0
    more = replace(timed, seeds=(1, 2)).run(tmp_path / "made", resume=True, show=False)
    steps = [len(losses(tmp_path / "made" / seed["folder"])) for seed in more["arms"][0]["seeds"]]
    assert steps == [tokens["cross_entropy"] // 128] * 2


def test_no_model_is_held_once_an_arm_is_trained(arena: Arena, tmp_path: Path) -> None:
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(one), PreTrainedModel) for one in gc.get_objects())

    before = alive()
    found = replace(arena, objectives=("reverse_kl",)).run(tmp_path / "made", show=False)
    assert alive() == before
    assert (
        {"bits_per_byte", "teacher_kl", "teacher_agreement", "tokens"} <= set(found["arms"][0]["means"]) <= set(TITLES)
    )


def test_an_objective_that_is_not_for_the_pair_is_refused_before_anything_is_written(
    arena: Arena, foreign: Path, tmp_path: Path
) -> None:
    common = replace(arena.common, student=str(foreign))
    with pytest.raises(VocabularyMismatch, match="reverse_kl"):
        replace(arena, common=common).run(tmp_path / "made")
    long = replace(SETTINGS, context=1024, batch_tokens=1024)
    with pytest.raises(UsageError, match="longer than the 512 tokens"):
        replace(arena, common=replace(arena.common, settings=long)).run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_an_arm_that_cannot_be_built_is_refused_before_anything_is_written(arena: Arena, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="heads is 0; choose a whole number"):
        replace(arena, objectives=("cross_entropy", "relations:heads=0")).run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_a_forecast_plans_arms_across_tokenizers(arena: Arena, foreign: Path) -> None:
    across = replace(arena, common=replace(arena.common, teacher=str(foreign)), objectives=("uld", "dskdv2_eta"))
    assert all(arm["tokens"] == 384 and arm["seconds"] > 0 for arm in across.estimate()["arms"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": ("cross_entropy", "kl")}, "'kl'"),
        ({"objectives": ("jsd:beta=2",)}, "beta"),
        ({"objectives": ("jsd@speed=2",)}, "no setting 'speed'.*cross_entropy, temperature, lr"),
        ({"objectives": ("jsd@lr=fast",)}, "sets lr to 'fast', which is not a number"),
        ({"objectives": ("jsd@lr=2",)}, "learning_rate is 2"),
        ({"objectives": ("jsd@lr=1e-4,lr=1e-3",)}, "sets lr twice"),
        ({"objectives": ("jsd:beta=0.3,beta=0.4",)}, "sets an option twice"),
        ({"objectives": ("jsd", "jsd@temperature=1")}, "are the same; give one"),
        ({"objectives": ("jsd", "jsd")}, "the arm jsd is given twice"),
        ({"objectives": ()}, "--objectives"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (1, 1)}, "the seed 1 is given twice"),
        ({"tokens": None}, "needs one budget"),
        ({"seconds": 3.0}, "needs one budget"),
        ({"epochs": 3.0}, "needs one budget"),
        ({"tokens": -5}, "-5"),
    ],
)
def test_what_makes_no_arena_is_refused_when_it_is_built(arena: Arena, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(arena, **changes)


def test_a_folder_that_holds_no_arena_is_left_alone(arena: Arena, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "model").mkdir(parents=True)
    (made / "model" / "card.json").write_text("{}")
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(OutputExists):
            arena.run(made, **options)
    assert (made / "model" / "card.json").is_file()


def test_a_forecast_gives_tokens_or_seconds(arena: Arena) -> None:
    alone = replace(arena, objectives=("cross_entropy", "cross_entropy@lr=1e-4"))
    by_tokens, by_time = alone.estimate(), replace(alone, tokens=None, seconds=60.0).estimate()
    assert [arm["arm"] for arm in by_tokens["arms"]] == list(alone.objectives)
    assert all(arm["tokens"] == 384 and arm["seconds"] > 0 for arm in by_tokens["arms"])
    assert all(arm["seconds"] == 60 and arm["tokens"] > 384 for arm in by_time["arms"])
    once, twice = (replace(alone, tokens=None, epochs=epochs).estimate()["arms"] for epochs in (1.0, 2.0))
    assert all(2 * a["tokens"] == b["tokens"] > 384 and a["seconds"] > 0 for a, b in zip(once, twice, strict=True))


def test_a_line_of_arms_is_split_where_an_arm_begins() -> None:
    assert split_arms("a, b:x=1,y=2,c") == ("a", "b:x=1,y=2", "c")
    assert split_arms("a@lr=1e-4,temperature=2,b@cross_entropy=0") == ("a@lr=1e-4,temperature=2", "b@cross_entropy=0")
    assert split_arms("") == ()


def test_an_arm_takes_what_it_sets_and_the_rest_from_all(common: DistillConfig) -> None:
    epochs = Arm.parse("jsd", common).make_stage(common, student=None, tokens=None, epochs=2.0, seed=4).settings
    assert (epochs.tokens, epochs.epochs) == (None, 2.0)
    arm = Arm.parse("jsd:beta=0.3@cross_entropy=0.5,lr=1e-4", common)
    assert (arm.objective.name, dict(arm.objective.options)) == ("jsd", {"beta": 0.3})
    assert (arm.objective.cross_entropy, arm.objective.temperature, arm.learning_rate) == (0.5, 1.0, 1e-4)
    assert arm.folder_name == "jsd-beta-0.3-cross_entropy-0.5-lr-1e-4"
    stage = arm.make_stage(replace(common, student=None, keep=0.5), student="there", tokens=9, seed=4)
    assert (stage.student, stage.keep, stage.settings.tokens, stage.settings.seed) == ("there", None, 9, 4)
    assert stage.settings.context == common.settings.context
    plain = Arm.parse("jsd", common)
    assert (plain.objective.cross_entropy, plain.learning_rate) == (0.7, 5e-4)


def test_an_arm_says_who_writes_its_text_and_is_refused_where_nobody_could_answer_for_it(common: DistillConfig) -> None:
    arm = Arm.parse("forward_kl@on_policy=0.5,cross_entropy=0", common)
    stage = arm.make_stage(common, student=None, tokens=9, seed=4)
    assert (stage.on_policy, stage.rollout, stage.objective.cross_entropy) == (0.5, "gkd", 0)
    evaluated = replace(common, settings=replace(common.settings, eval_every=2))
    adaptive = Arm.parse("forward_kl@rollout=distillm", evaluated)
    assert adaptive.make_stage(evaluated, student=None, tokens=9, seed=4).rollout == "distillm"
    with pytest.raises(UsageError, match="--eval-every"):
        Arm.parse("forward_kl@rollout=distillm", common)
    with pytest.raises(UsageError, match="learns nothing from what the student itself writes"):
        Arm.parse("cross_entropy@on_policy=0.5", common)
    with pytest.raises(UsageError, match="there is no rollout 'dice'"):
        Arm.parse("forward_kl@rollout=dice", common)
    with pytest.raises(UsageError, match="give a budget in tokens"):
        Arena(common=common, objectives=("forward_kl@on_policy=0.5",), seconds=60.0)


@pytest.mark.slow
def test_an_arm_that_writes_takes_part(common: DistillConfig, tmp_path: Path) -> None:
    arena = Arena(common=common, objectives=("forward_kl", "forward_kl@on_policy=0.5"), tokens=384, seeds=(1,))
    found = arena.run(tmp_path / "made", show=False)
    still, written = (arm["seeds"][0]["folder"] for arm in found["arms"])
    assert losses(tmp_path / "made" / still) != losses(tmp_path / "made" / written)
    line = json.loads((tmp_path / "made" / written / "metrics.jsonl").read_text().splitlines()[0])
    assert "rollout_documents" in line
