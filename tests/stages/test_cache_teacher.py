"""A teacher's cache from end to end: what it holds, when it is refused, and that it teaches as a live one does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.world import saved, written
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import (
    ArtifactError,
    CacheMismatch,
    Interrupted,
    NotFound,
    OutputExists,
    UnsupportedModel,
    UsageError,
)
from potstill.core.types import Needs, supervised_positions
from potstill.data.packing import collate
from potstill.models.load import load_model
from potstill.models.signals import compute_signals, get_constant_head
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.registry import OBJECTIVE_SPECS
from potstill.ops.coarse import coarsen
from potstill.stages import cache_teacher as capturing
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.dataset import prepare_dataset
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.models import open_caches
from potstill.stages.distill.run import distill
from potstill.stages.run_models import choose_dtype
from potstill.teachers import cache_folder, cache_writer
from potstill.teachers.cache_writer import CachedWindow
from potstill.teachers.cached import (
    Manifest,
    TeacherCache,
    find_faults,
    list_caches,
    remove_cache,
)
from potstill.teachers.cached_states import CachedHiddenStates
from potstill.train.config import TrainConfig

SETTINGS = TrainConfig(tokens=512, context=64, batch_tokens=128, micro_tokens=64)


@pytest.fixture
def stage(teacher: Path, text: Path) -> CacheTeacherConfig:
    return CacheTeacherConfig(teacher=str(teacher), data=str(text), context=64, top_k=8, classes=3, dtype="float32")


@pytest.fixture
def whole(stage: CacheTeacherConfig, teacher: Path, tmp_path: Path) -> Path:
    """A cache that keeps all of every distribution, exactly."""
    replace(stage, top_k=10_000, exact=True).run(tmp_path / "whole", show=False)
    return tmp_path / "whole"


def distil(teacher: Path, text: Path, **more: object) -> DistillConfig:
    stage = DistillConfig(
        teacher=str(teacher), keep=0.755, data=str(text), settings=SETTINGS, dtype="float32", documents=2
    )
    return replace(stage, **more)  # type: ignore[arg-type]


def test_a_cache_says_of_any_batch_of_its_text_what_the_teacher_says(
    stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    stage = replace(stage, exact=True, hidden=True)
    manifest = stage.run(tmp_path / "cache", show=False)
    cache, live = TeacherCache(tmp_path / "cache"), load_model(teacher)
    packs = prepare_dataset(
        DatasetConfig(data=str(text), context=64, seed=9), live.tokenizer, tokens=512, caches=[cache]
    ).packs
    batch = collate([packs[i] for i in (3, 0, 5)])
    needs = Needs(supervised_positions(batch)[0])
    found = cache.signals(batch, needs)
    with torch.no_grad():
        said = compute_signals(live.model, batch, Needs(needs.positions), vocabulary=manifest.facts.vocabulary)
    expected = coarsen(said.logits(said.rows), 8, cache.members)
    told = found.logits(found.rows)
    ids, order = expected.ids.sort(-1)
    assert torch.equal(told.ids, ids)
    torch.testing.assert_close(told.log_p, expected.log_p.gather(-1, order), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(told.log_rest, expected.log_rest, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache.hidden_states(batch).float(), said.rows, rtol=1e-2, atol=1e-2)
    assert said.head is not None
    hidden = cache.hidden_states(batch).float()
    for speaker in (cache, CachedHiddenStates(cache, said.head)):
        with pytest.raises(UnsupportedModel, match="the objective needs more"):
            speaker.signals(batch, replace(needs, layers=frozenset({-1})))
    assert len(found.logits(found.rows[4:7])) == 3
    some = needs.positions.clone()
    some[0, ::3] = False
    part = cache.signals(batch, Needs(some))
    chosen = some[needs.positions].nonzero()[:, 0]
    assert torch.equal(part.logits(part.rows[1:6]).log_p, told.log_p[chosen[1:6]])
    assert torch.equal(CachedHiddenStates(cache, said.head).signals(batch, Needs(some)).rows.float(), hidden[chosen])
    with pytest.raises(UnsupportedModel, match="give trained tokens only"):
        cache.signals(batch, Needs(torch.ones_like(some)))
    assert manifest.rows == packs.num_trained
    assert manifest.bytes == sum((tmp_path / "cache" / name).stat().st_size for name in manifest.files)


RECALLED = [name for name, method in OBJECTIVE_SPECS.items() if method.needs_only_last_hidden]


@pytest.mark.parametrize("name", [RECALLED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in RECALLED[1:])])
def test_kept_hidden_states_teach_to_the_bit_what_the_live_teacher_does(
    name: str, stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    replace(stage, hidden=True, dtype="bfloat16").run(tmp_path / "cache", show=False)
    own = {"dtype": "bfloat16", "objective": ObjectiveConfig(name=name, cross_entropy=0.0)}
    cached = distill(
        distil(teacher, text, teacher_cache=str(tmp_path / "cache"), **own), tmp_path / "cached", show=False
    )
    live = distill(distil(teacher, text, **own), tmp_path / "live", show=False)
    assert live.card.cost["losses"]
    assert cached.card.cost["losses"] == live.card.cost["losses"]
    ours, theirs = (load_file(run.out / "model.safetensors") for run in (cached, live))
    for key, weight in theirs.items():
        assert torch.equal(ours[key], weight), key


def test_kept_hidden_states_serve_at_any_temperature_and_under_a_head_that_explains_them(
    stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(stage, hidden=True).run(tmp_path / "cache", show=False)
    warm = distil(
        teacher, text, teacher_cache=str(tmp_path / "cache"), objective=ObjectiveConfig(name="dskd", temperature=2.0)
    )
    assert distill(warm, tmp_path / "warm", show=False).card.cost["losses"]["dskd_student_space"] > 0
    monkeypatch.setattr("potstill.models.signals.is_head_reproduced", lambda model: False)
    monkeypatch.setattr("potstill.models.signals._find_transformed_rows", lambda model: None)
    with pytest.raises(UnsupportedModel, match="no head gives the logits"):
        get_constant_head(load_model(teacher).model)


def test_what_wants_hidden_states_is_refused_a_cache_without_them(
    stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    stage.run(tmp_path / "cache", show=False)
    cache = str(tmp_path / "cache")
    with pytest.raises(UsageError, match=r"dskd learns from hidden states, .* stores none; make it with --hidden"):
        distill(
            distil(teacher, text, teacher_cache=cache, objective=ObjectiveConfig(name="dskd")),
            tmp_path / "x",
            show=False,
        )
    with pytest.raises(UsageError, match="dskd reads a teacher's weights; give a --teacher whose weights are here"):
        DistillConfig(student="s", data=str(text), teacher_cache=cache, objective=ObjectiveConfig(name="dskd"))
    for name in {name for name, spec in OBJECTIVE_SPECS.items() if spec.uses_teacher} - set(RECALLED):
        with pytest.raises(UsageError, match=f"{name} needs more of a teacher than a cache keeps"):
            distil(teacher, text, teacher_cache=cache, objective=ObjectiveConfig(name=name))


def test_a_student_learns_from_a_whole_cache_what_it_learns_from_the_live_teacher(
    whole: Path, teacher: Path, text: Path, tmp_path: Path
) -> None:
    live = distill(distil(teacher, text), tmp_path / "live", show=False)
    cached = distill(distil(teacher, text, teacher_cache=str(whole)), tmp_path / "cached", show=False)
    ours, theirs = (load_file(run.out / "model.safetensors") for run in (cached, live))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=2e-5)
    assert cached.card.cost["losses"] == pytest.approx(live.card.cost["losses"], rel=1e-4)
    assert cached.measures["teacher"] == live.measures["teacher"]


def test_a_small_cache_bounds_the_live_loss_from_below_and_teaches_nearly_as_well(
    stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    stage.run(tmp_path / "cache", show=False)
    settings = replace(SETTINGS, tokens=2048, learning_rate=3e-3)
    own = {"settings": settings, "objective": ObjectiveConfig(cross_entropy=0.0)}
    cached = distill(
        distil(teacher, text, teacher_cache=str(tmp_path / "cache"), **own), tmp_path / "cached", show=False
    )
    live = distill(distil(teacher, text, **own), tmp_path / "live", show=False)
    losses = [run.card.cost["losses"]["forward_kl"] for run in (cached, live)]
    assert 0 < losses[0] < losses[1]
    kl = [next(m.value for m in run.measures[run.out.name] if m.name == "teacher_kl") for run in (cached, live)]
    before = next(m.value for m in live.measures["before training"] if m.name == "teacher_kl")
    assert kl[0] < before
    assert before - kl[0] > 0.5 * (before - kl[1])


def test_a_stopped_capture_continues_to_the_same_bytes(
    stage: CacheTeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "PACKS_PER_SHARD", 2)
    stage.run(tmp_path / "straight", show=False)
    original, calls = cache_writer.build_shard, iter(range(100))

    def stops_at_the_third(windows: list[CachedWindow]) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(windows)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "build_shard", stops_at_the_third)
        with pytest.raises(Interrupted, match="--resume"):
            stage.run(tmp_path / "again", show=False)
    assert {f.name for f in (tmp_path / "again").iterdir()} == {"training"}
    with pytest.raises(OutputExists):
        stage.run(tmp_path / "again", show=False)
    (tmp_path / "again" / "training" / "shard-00001.safetensors").write_bytes(b"cut short")
    stage.run(tmp_path / "again", resume=True, show=False)
    assert Manifest.from_folder(tmp_path / "again").files == Manifest.from_folder(tmp_path / "straight").files
    assert not list(tmp_path.glob(".again*"))


def test_a_capture_that_was_killed_before_its_last_move_is_taken_up(
    stage: CacheTeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache_folder, "_move_into_place", lambda out: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.run(tmp_path / "cache", show=False)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    manifest = stage.run(tmp_path / "cache", resume=True, show=False)
    assert not list(find_faults(tmp_path / "cache"))
    assert not list(tmp_path.glob(".cache*"))
    assert stage.run(tmp_path / "cache", resume=True, show=False) == manifest
    with pytest.raises(OutputExists, match="another cache"):
        replace(stage, top_k=3).run(tmp_path / "cache", resume=True, show=False)
    assert remove_cache(tmp_path / "cache") > 0


def test_a_capture_with_other_settings_or_of_another_version_is_not_continued(
    stage: CacheTeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_writer, "PACKS_PER_SHARD", 2)
    calls, original = iter(range(100)), cache_writer.build_shard
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "build_shard", lambda w: original(w) if next(calls) < 1 else [][0])
        with pytest.raises(IndexError):
            stage.run(tmp_path / "cache", show=False)
    with pytest.raises(UsageError, match="begun with top_k 8, and now it is 4"):
        replace(stage, top_k=4).run(tmp_path / "cache", resume=True, show=False)
    monkeypatch.setattr(capturing, "VERSION", 0)
    with pytest.raises(UsageError, match="begun with format 3, and now it is 0"):
        stage.run(tmp_path / "cache", resume=True, show=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": replace(SETTINGS, context=32, batch_tokens=128)}, "context 64, and this run has 32"),
        ({"settings": replace(SETTINGS, eval_every=2)}, "held-out text"),
        ({"objective": ObjectiveConfig(temperature=2.0)}, "temperature 1.0, and this run has 2.0"),
        ({"dtype": "bfloat16"}, "dtype float32, and this run has bfloat16"),
        ({"objective": ObjectiveConfig(name="adaptive_kl")}, "adaptive_kl"),
        ({"objective": ObjectiveConfig(name="cross_entropy")}, "uses no teacher"),
    ],
)
def test_a_use_that_it_was_not_made_for_is_refused_with_the_two_values(
    change: dict[str, object], said: str, stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    stage.run(tmp_path / "cache", show=False)
    with pytest.raises(ValueError, match=said):
        distill(distil(teacher, text, teacher_cache=str(tmp_path / "cache"), **change), tmp_path / "made", show=False)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_a_run_that_leaves_it_open_multiplies_as_the_teacher_of_its_cache_did(
    name: str, stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    replace(stage, dtype=name).run(tmp_path / "cache", show=False)
    learns = distil(teacher, text, teacher_cache=str(tmp_path / "cache"), dtype="auto")
    assert choose_dtype(learns, open_caches(learns)) == getattr(torch, name)
    distill(learns, tmp_path / "made", show=False)


def test_another_teacher_is_refused(
    stage: CacheTeacherConfig,
    text: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    stage.run(tmp_path / "cache", show=False)
    with torch.no_grad():
        tiny_llama.model.norm.weight.mul_(1.5)
    other = saved(tmp_path / "other", tiny_llama, tiny_tokenizer)
    with pytest.raises(CacheMismatch, match="was made with teacher"):
        distill(distil(other, text, teacher_cache=str(tmp_path / "cache")), tmp_path / "made", show=False)


def test_a_teacher_whose_config_alone_was_changed_is_refused(
    stage: CacheTeacherConfig, text: Path, teacher: Path, tmp_path: Path
) -> None:
    stage.run(tmp_path / "cache", show=False)
    config = json.loads((teacher / "config.json").read_text())
    harmless = {**config, "transformers_version": "0.0.1", "dtype": "bfloat16", "use_cache": False}
    (teacher / "config.json").write_text(json.dumps(harmless))
    distill(distil(teacher, text, teacher_cache=str(tmp_path / "cache")), tmp_path / "made", show=False)
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(CacheMismatch, match="was made with config"):
        distill(distil(teacher, text, teacher_cache=str(tmp_path / "cache")), tmp_path / "again", show=False)


def test_a_tokenizer_that_ends_documents_otherwise_is_refused(
    stage: CacheTeacherConfig, text: Path, teacher: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    stage.run(tmp_path / "cache", show=False)
    tiny_tokenizer.eos_token = "a"
    tiny_tokenizer.save_pretrained(teacher)
    with pytest.raises(CacheMismatch, match="was made with tokenizer"):
        distill(distil(teacher, text, teacher_cache=str(tmp_path / "cache")), tmp_path / "made", show=False)


def test_an_altered_cache_teaches_nothing(stage: CacheTeacherConfig, text: Path, teacher: Path, tmp_path: Path) -> None:
    stage.run(tmp_path / "cache", show=False)
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactError, match="is altered"):
        distill(distil(teacher, text, teacher_cache=str(tmp_path / "cache")), tmp_path / "made", show=False)


def test_a_teacher_that_says_nothing_sensible_is_not_captured(
    stage: CacheTeacherConfig, teacher: Path, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] = float("nan")
    tiny_llama.save_pretrained(teacher)
    with pytest.raises(UnsupportedModel, match="NaN"):
        replace(stage, classes=1).run(tmp_path / "cache", show=False)
    assert not (tmp_path / "cache").exists()


def test_other_text_is_refused(stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path) -> None:
    stage.run(tmp_path / "cache", show=False)
    lines = [*map(json.loads, text.read_text().splitlines()), *({"text": f"more {i}"} for i in range(9))]
    more = written(tmp_path / "more.jsonl", lines)
    with pytest.raises(CacheMismatch, match="was made with text"):
        distill(distil(teacher, more, teacher_cache=str(tmp_path / "cache")), tmp_path / "made", show=False)
    cache = TeacherCache(tmp_path / "cache")
    batch = collate(
        [{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6]), "lengths": torch.tensor([2])}]
    )
    with pytest.raises(CacheMismatch, match="is not in the cache"):
        cache.signals(batch, Needs(supervised_positions(batch)[0]))
    with pytest.raises(UnsupportedModel, match="stores no hidden states; make it with --hidden"):
        cache.hidden_states(batch)


def test_drawn_tokens_give_the_forward_kl_its_gradient_on_average(
    stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    replace(stage, sampled=4_000).run(tmp_path / "cache", show=False)
    cache, live = TeacherCache(tmp_path / "cache"), load_model(teacher)
    packs = prepare_dataset(DatasetConfig(data=str(text), context=64), live.tokenizer, tokens=64, caches=[cache]).packs
    batch = collate([packs[0]])
    needs = Needs(supervised_positions(batch)[0])
    drawn = cache.signals(batch, needs)
    with torch.no_grad():
        said = compute_signals(live.model, batch, needs, vocabulary=cache.manifest.facts.vocabulary)
    p = said.logits(said.rows).softmax(-1)
    told = drawn.logits(drawn.rows)
    share = torch.zeros_like(p).scatter_add_(-1, told.ids, told.log_p.exp())
    assert (share - p).abs().max() < 0.05
    assert told.log_rest.isneginf().all()
    run = distill(distil(teacher, text, teacher_cache=str(tmp_path / "cache")), tmp_path / "made", show=False)
    assert run.card.cost["losses"]["forward_kl"] > 0
    reverse = distil(teacher, text, teacher_cache=str(tmp_path / "cache"), objective=ObjectiveConfig(name="reverse_kl"))
    with pytest.raises(UsageError, match="forward_kl only"):
        distill(reverse, tmp_path / "x", show=False)


def test_keeping_house(stage: CacheTeacherConfig, tmp_path: Path) -> None:
    stage.run(tmp_path / "cache", show=False)
    assert list_caches(tmp_path) == list_caches(tmp_path / "cache") == [tmp_path / "cache"]
    assert not list(find_faults(tmp_path / "cache"))
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert list(find_faults(tmp_path / "cache")) == ["shard-00000.safetensors is altered"]
    (tmp_path / "cache" / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match=r"mine\.txt"):
        remove_cache(tmp_path / "cache")
    (tmp_path / "cache" / "mine.txt").unlink()
    assert remove_cache(tmp_path / "cache") > 0
    assert not (tmp_path / "cache").exists()
    with pytest.raises(NotFound):
        remove_cache(tmp_path)
    assert tmp_path.exists()


def test_part_of_the_text_is_enough_and_only_that_is_trained_on(
    stage: CacheTeacherConfig, teacher: Path, text: Path, tmp_path: Path
) -> None:
    manifest = replace(stage, tokens=300).run(tmp_path / "cache", show=False)
    run = distill(distil(teacher, text, teacher_cache=str(tmp_path / "cache")), tmp_path / "made", show=False)
    assert 300 <= run.card.data["tokens"] < 300 + 64
    assert manifest.windows == run.card.data["documents"]


def test_an_interrupt_before_the_first_shard_promises_nothing(
    stage: CacheTeacherConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(windows: list[CachedWindow]) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_writer, "build_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path / "cache", show=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("torn", ['{"identity": "a', "[]", '{"file": {}}'])
def test_a_record_of_shards_that_is_torn_is_one_sentence(stage: CacheTeacherConfig, tmp_path: Path, torn: str) -> None:
    (tmp_path / "cache" / "training").mkdir(parents=True)
    (tmp_path / "cache" / "training" / "capture.json").write_text(torn)
    with pytest.raises(ArtifactError, match=r"capture.json cannot be read .* --overwrite"):
        stage.run(tmp_path / "cache", resume=True, show=False)


def test_a_capture_through_a_link_lands_where_the_link_leads(stage: CacheTeacherConfig, tmp_path: Path) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    (tmp_path / "cache").symlink_to(tmp_path / "disk" / "big")
    stage.run(tmp_path / "cache", show=False)
    assert not list(find_faults(tmp_path / "disk" / "big"))
    assert [one.name for one in (tmp_path / "disk").iterdir()] == ["big"]
    assert not list(tmp_path.glob(".cache*"))
