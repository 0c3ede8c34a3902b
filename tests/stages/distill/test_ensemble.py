"""Several teachers in one run: what they teach, what the card says of them, what is refused."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.serving import Server
from tests.stages.distill.test_run import SETTINGS, same
from tests.stages.world import interrupted, saved, written
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import DataError, Interrupted, UsageError, VocabularyMismatch
from potstill.data.row_reader import Route
from potstill.models.load import compute_digest
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.arena.arena import Arena
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.ensemble import TeacherOptions
from potstill.stages.distill.run import distill
from potstill.stages.plan.plan import Plan

WORDS = ["the", "still", "boils", "a", "wash", "and", "its", "spirit"]


@pytest.fixture
def other(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A second teacher, that differs from the first."""
    tiny_llama.config.max_position_embeddings = 512
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tiny_llama.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return saved(tmp_path / "other", tiny_llama, tiny_tokenizer)


@pytest.fixture
def student(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_llama.config.max_position_embeddings = 512
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.mul_(0.5)
    return saved(tmp_path / "student", tiny_llama, tiny_tokenizer)


@pytest.fixture
def routed(tmp_path: Path) -> Path:
    """Eighty texts, of which every third is for the second teacher."""
    rows = [
        {"text": " ".join(WORDS[(i * k) % 8] for k in range(1, 12)) + f" {i}.", "for": "two" if i % 3 == 0 else "one"}
        for i in range(80)
    ]
    return written(tmp_path / "routed.jsonl", rows)


@pytest.fixture
def stage(teacher: Path, other: Path, student: Path, routed: Path) -> DistillConfig:
    own = {
        "data": str(routed),
        "settings": SETTINGS,
        "dtype": "float32",
        "documents": 2,
        "skip_doctor": True,
        "save_dtype": "float32",
    }
    return DistillConfig(teacher=(f"one={teacher}", f"two={other}"), student=str(student), **own)


def test_one_teacher_twice_is_that_teacher_alone(stage: DistillConfig, teacher: Path, tmp_path: Path) -> None:
    alone = distill(replace(stage, teacher=str(teacher)), tmp_path / "alone", show=False)
    twice = (f"one={teacher}", f"two={teacher}")
    for combine in ("average", "route:for"):
        run = distill(replace(stage, teacher=twice, combine=combine), tmp_path / combine[:5], show=False)
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_the_card_names_every_teacher_and_metrics_show_each(
    stage: DistillConfig, teacher: Path, other: Path, tmp_path: Path
) -> None:
    run = distill(replace(stage, combine="route:for", skip_doctor=False), tmp_path / "made", show=False)
    student, *teachers = run.card.parents
    assert student.role == "student"
    assert [(one.role, one.name, one.digest) for one in teachers] == [
        ("teacher", str(folder), compute_digest(folder)) for folder in (teacher, other)
    ]
    assert set(run.card.cost["losses"]) == {"cross_entropy", "forward_kl.one", "forward_kl.two"}
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert all(any(line[f"forward_kl.{name}"] > 0 for line in lines) for name in ("one", "two"))
    assert run.card.data["routes"].keys() == {"one", "two"}
    readme = (run.out / "README.md").read_text()
    assert "forward kl to `one=teacher` and `two=other`, each on the documents that `for` assigns to it" in readme
    assert "taught by" in readme
    checked = [one["name"] for one in run.card.invariants]
    assert {"shared vocabulary (one)", "shared vocabulary (two)", "loss matches reference (two)"} <= set(checked)
    card = json.loads((run.out / "card.json").read_text())
    assert card["stage"]["teacher"] == [f"one={teacher}", f"two={other}"]


@pytest.mark.parametrize("combine", [pytest.param("average", marks=pytest.mark.slow), "confidence", "route:for"])
def test_live_cached_and_served_teachers_mix_and_teach_as_live_ones(
    combine: str, stage: DistillConfig, server: Server, routed: Path, tmp_path: Path
) -> None:
    (_, second), served = stage.teacher or (), server.model
    stage = replace(stage, teacher=(f"one={served}", second), combine=combine)
    expected = distill(stage, tmp_path / "live", show=False)
    whole = CacheTeacherConfig(
        teacher=second.partition("=")[2], data=str(routed), context=64, top_k=259, exact=True, dtype="float32"
    )
    whole.run(tmp_path / "cache", show=False)
    mixed = replace(stage, teacher=(f"one={server.url}", f"two={tmp_path / 'cache'}"), top_k=259)
    found = distill(mixed, tmp_path / "mixed", show=False)
    assert found.card.cost["losses"] == pytest.approx(expected.card.cost["losses"], rel=1e-3)
    assert [one.digest for one in found.card.parents[2:]] == [one.digest for one in expected.card.parents[2:]]


def test_a_student_cut_from_the_first_teacher_learns_from_both(stage: DistillConfig, tmp_path: Path) -> None:
    run = distill(replace(stage, student=None, keep=0.755, combine="confidence"), tmp_path / "made", show=False)
    assert [one.role for one in run.card.parents] == ["teacher, which it was pruned from", "teacher"]
    assert "pruned to 75.5% of its parameters" in (run.out / "README.md").read_text()


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_student_and_with_no_other_teachers(
    stage: DistillConfig, tmp_path: Path
) -> None:
    stage = replace(stage, combine="route:for", settings=replace(SETTINGS, tokens=2048))
    straight = distill(stage, tmp_path / "straight", show=False)
    out = tmp_path / "made"
    with pytest.raises(Interrupted), interrupted(out):
        distill(stage, out, show=False)
    one = (stage.teacher or ())[0]
    for changed, message in (
        (replace(stage, teacher=(one, one.replace("one=", "two="))), r"begun with other models \(teacher\); give"),
        (replace(stage, combine="average"), "begun with combine route:for, and now it is average"),
    ):
        with pytest.raises(UsageError, match=message):
            distill(changed, out, resume=True, show=False)
    distill(stage, out, resume=True, show=False)
    assert same(out, straight.out)


def test_what_the_student_writes_keeps_its_route(stage: DistillConfig, tmp_path: Path) -> None:
    stage = replace(stage, combine="route:for", on_policy=0.5)
    run = distill(stage, tmp_path / "made", show=False)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["rollout_documents"] for line in lines) > 0
    assert any(line["forward_kl.two"] > 0 for line in lines)


# what is refused


@pytest.mark.parametrize(
    ("teachers", "combine", "says"),
    [
        (("a=x", "a=y"), "average", "two teachers are called 'a'"),
        (("runs/x", "other/x"), "average", "two teachers are called 'x'; name them"),
        (("a", "b"), "mean", "'mean' is none of average, confidence and route:COLUMN"),
        (("a", "b"), "route", "'route' is none of"),
        (("a", "b"), "average:x", "is none of"),
        (("math=a", "b"), "route:subject", "--teacher VALUE=b"),
    ],
)
def test_teachers_that_cannot_be_told_apart_or_combined_are_refused(
    teachers: tuple[str, ...], combine: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        TeacherOptions.parse(teachers, combine, cache=None, top_k=20)


def locations(teachers: tuple[str, ...], combine: str) -> dict[str, str | None]:
    options = TeacherOptions.parse(teachers, combine, cache=None, top_k=20)
    assert options.ensemble is not None
    return {name: source.location for name, source in zip(options.ensemble.names, options.sources, strict=True)}


def test_names_are_given_or_taken_from_what_the_teachers_are() -> None:
    given = ("math=a/b", "runs/lr=3", "http://host:1/v1?x=1#qwen", "http://host:1/v1")
    assert locations(given, "average") == {
        "math": "a/b",
        "lr=3": "runs/lr=3",
        "qwen": "http://host:1/v1?x=1#qwen",
        "http://host:1/v1": "http://host:1/v1",
    }
    assert TeacherOptions.parse(("a=x", "b=y"), "route:of:it", cache=None, top_k=20).route == Route("of:it", ("a", "b"))
    assert locations(("text/html=x", "C:d=y"), "route:kind") == {
        "text/html": "x",
        "C:d": "y",
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": ObjectiveConfig(name="dskd")}, "dskd learns from the hidden states"),
        ({"objective": ObjectiveConfig(name="cross_entropy")}, "one teacher measures"),
        ({"teacher_cache": "kept"}, "a cache is one of them"),
        ({"rollout": "minillm", "on_policy": 0.5}, "--rollout minillm samples with one teacher"),
        ({"teacher": "one"}, "--combine confidence is for several"),
        ({"teacher": ("a=http://127.0.0.1:9/v1", "b"), "student": None, "keep": 0.5}, "prune the teacher's weights"),
        ({"teacher": ("a", "b=http://127.0.0.1:9/v1"), "top_k": 0}, "--top-k is 0"),
    ],
)
def test_what_several_teachers_cannot_do_is_refused_before_anything_is_read(
    stage: DistillConfig, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        dataclasses.replace(stage, combine="confidence", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("combine", "share"), [("average", 1.0), ("route:for", 0.5)])
def test_a_plan_counts_every_teacher(combine: str, share: float, stage: DistillConfig, teacher: Path) -> None:
    single = Plan(distill=replace(stage, teacher=str(teacher)), measure=False).run()
    double = Plan(distill=replace(stage, combine=combine), measure=False).run()
    assert double["memory"]["teacher"] == 2 * single["memory"]["teacher"]
    flops = [plan["flops_per_token"]["teacher forward"] for plan in (single, double)]
    assert flops[1] == pytest.approx(2 * share * flops[0])


def test_a_plan_measures_steps_with_every_teacher(stage: DistillConfig) -> None:
    plan = Plan(distill=replace(stage, student=None, keep=0.755)).run()
    assert plan["time"]["seconds_per_step"] > 0
    assert any("were measured" in note for note in plan["notes"])


def test_an_arena_trains_with_several_teachers(stage: DistillConfig, tmp_path: Path) -> None:
    arena = Arena(common=stage, objectives=("forward_kl", "jsd"), tokens=512, seeds=(1,), prompts=0)
    report = arena.run(tmp_path / "arena", show=False)
    assert {arm["arm"] for arm in report["arms"]} == {"forward_kl", "jsd"}
    with pytest.raises(UsageError, match="first teacher; give a local model"):
        Arena(
            common=replace(stage, teacher=("a=http://127.0.0.1:9/v1", *(stage.teacher or ())[1:])),
            objectives=("jsd",),
            tokens=512,
        )


def test_documents_for_nobody_and_teachers_without_documents_are_refused(
    stage: DistillConfig, teacher: Path, tmp_path: Path
) -> None:
    both = stage.teacher or ()
    idle = replace(stage, combine="route:for", teacher=(*both, f"three={teacher}"))
    with pytest.raises(DataError, match="has 'three' in `for`, so the teacher 'three' would teach nothing"):
        distill(idle, tmp_path / "made", show=False)
    unknown = replace(stage, combine="route:for", teacher=(both[0], f"three={teacher}"))
    with pytest.raises(DataError, match="line 1 has 'two' in `for`, and no teacher has that name"):
        distill(unknown, tmp_path / "made", show=False)
    with pytest.raises(DataError, match="line 1 has no column `whose` to route by; it has text, for"):
        distill(replace(stage, combine="route:whose"), tmp_path / "made", show=False)
    assert not (tmp_path / "made").exists()


def test_a_teacher_with_other_tokens_is_refused(
    stage: DistillConfig, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_tokenizer.add_tokens(["fox"])
    tiny_llama.resize_token_embeddings(len(tiny_tokenizer), mean_resizing=False)
    strange = saved(tmp_path / "strange", tiny_llama, tiny_tokenizer)
    with pytest.raises(VocabularyMismatch, match="of several teachers each needs the student's tokenizer"):
        distill(replace(stage, teacher=((stage.teacher or ())[0], str(strange))), tmp_path / "made", show=False)


def test_drawn_tokens_do_not_say_how_sure_a_teacher_is(
    stage: DistillConfig, other: Path, routed: Path, tmp_path: Path
) -> None:
    CacheTeacherConfig(teacher=str(other), data=str(routed), context=64, sampled=8, dtype="float32").run(
        tmp_path / "cache", show=False
    )
    mixed = ((stage.teacher or ())[0], f"two={tmp_path / 'cache'}")
    with pytest.raises(UsageError, match="capture --top-k, or give --combine average"):
        distill(replace(stage, teacher=mixed, combine="confidence"), tmp_path / "made", show=False)
