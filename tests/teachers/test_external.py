"""A student learns where its teacher's weights are not: from a server that has them, or from what a cache kept."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.serving import Server, serving
from tests.stages.distill.test_run import SETTINGS, same
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import CacheMismatch, NotFound, ServerError, UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.training import TrainingResult
from potstill.teachers import http_client
from potstill.teachers.http_client import is_address

URL = "http://127.0.0.1:9/v1"


@pytest.fixture
def student(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The served teacher, half of its embeddings' size away."""
    tiny_llama.config.max_position_embeddings = 512
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.mul_(0.5)
    tiny_llama.save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def stage(student: Path, text: Path) -> DistillConfig:
    own = {"data": str(text), "settings": SETTINGS, "dtype": "float32", "documents": 2}
    return DistillConfig(teacher=URL, student=str(student), **own)


@pytest.fixture
def cache(server: Server, text: Path, tmp_path: Path) -> Path:
    capture = CacheTeacherConfig(
        teacher=str(server.model), data=str(text), context=64, top_k=8, classes=3, dtype="float32"
    )
    capture.run(tmp_path / "cache", show=False)
    return tmp_path / "cache"


def value(run: TrainingResult, model: str, name: str) -> float:
    return next(m.value for m in run.measures[model] if m.name == name)


def test_a_student_learns_from_a_server_what_it_learns_from_the_live_teacher(
    stage: DistillConfig, server: Server, tmp_path: Path
) -> None:
    live = distill(replace(stage, teacher=str(server.model)), tmp_path / "live", show=False)
    served = distill(replace(stage, teacher=server.url, top_k=259), tmp_path / "served", show=False)
    assert served.card.cost["losses"] == pytest.approx(live.card.cost["losses"], rel=1e-4)
    for name in ("bits_per_byte", "perplexity"):
        assert value(served, "teacher", name) == pytest.approx(value(live, "teacher", name), rel=1e-5)
        assert value(served, "served", name) == pytest.approx(value(live, "live", name), rel=1e-3)
    assert {thread.name for thread in threading.enumerate()}.isdisjoint({"potstill-http"})


def test_a_few_tokens_of_each_distribution_bound_the_loss_from_below_and_teach(
    stage: DistillConfig, server: Server, tmp_path: Path
) -> None:
    stage = replace(
        stage, objective=ObjectiveConfig(cross_entropy=0.0), settings=replace(SETTINGS, tokens=1024, learning_rate=3e-3)
    )
    live = distill(replace(stage, teacher=str(server.model)), tmp_path / "live", show=False)
    served = distill(replace(stage, teacher=server.url, top_k=8), tmp_path / "served", show=False)
    assert 0 < served.card.cost["losses"]["forward_kl"] < live.card.cost["losses"]["forward_kl"]
    first, *_, last = [json.loads(line) for line in (served.out / "metrics.jsonl").read_text().splitlines()]
    assert last["forward_kl"] < first["forward_kl"]


def test_the_card_of_a_served_teacher_says_what_is_missing_and_why(
    stage: DistillConfig, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POTSTILL_API_KEY", "sk-secret")
    run = distill(replace(stage, teacher=server.url), tmp_path / "made", show=False)
    assert list(run.measures) == ["teacher", "before training", "made"]
    assert {m.name for m in run.measures["teacher"]} == {"bits_per_byte", "perplexity"}
    assert {m.name for m in run.measures["made"]} == {
        "bits_per_byte",
        "perplexity",
        "parameters",
        "bytes",
        "bfloat16_bytes",
    }
    student, teacher = run.card.parents
    assert (student.role, teacher.role, teacher.digest) == ("student", "teacher", None)
    assert teacher.name == f"{server.url}#{server.model}"
    readme = (run.out / "README.md").read_text()
    assert "its weights were not here, so KL and agreement with it" in readme
    assert "potstill has not seen its weights" in readme
    assert f"forward kl to `{server.url}`" in readme
    assert "the server tokenizes known texts alike (prompt_logprobs)" in readme
    assert "None" not in readme
    assert not [file for file in run.out.iterdir() if b"sk-secret" in file.read_bytes()]


def test_evaluations_on_the_way_ask_the_server_too(stage: DistillConfig, server: Server, tmp_path: Path) -> None:
    settings = replace(SETTINGS, eval_every=2)
    run = distill(replace(stage, teacher=server.url, settings=settings), tmp_path / "made", show=False)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_forward_kl" in line] == [2, 4]


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_with_a_checkpoint_from_which_it_continues(
    stage: DistillConfig, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "FIRST_WAIT", 0.001)
    stage = replace(stage, settings=replace(SETTINGS, tokens=4096))
    out = tmp_path / "made"
    with serving(server.model) as dying:
        port = int(dying.url.rpartition(":")[2].partition("/")[0])
        killer = threading.Thread(target=kill_after_a_step, args=(dying, out))
        killer.start()
        with pytest.raises(ServerError, match=r"gave no answer in 6 tries .*--resume"):
            distill(replace(stage, teacher=dying.url), out, show=False)
        killer.join()
    assert list((out / "training").glob("checkpoint-*"))
    with serving(server.model, port=port):
        resumed = distill(replace(stage, teacher=dying.url), out, resume=True, show=False)
        straight = distill(replace(stage, teacher=dying.url), tmp_path / "straight", show=False)
    assert not (out / "training").exists()
    assert same(resumed.out, straight.out)


def kill_after_a_step(dying: Server, out: Path) -> None:
    while not list((out / "training").glob("checkpoint-*")):
        time.sleep(0.002)
    dying.process.kill()


# a cache


def test_a_student_learns_from_a_cache_alone_what_it_learns_beside_the_teacher(
    stage: DistillConfig, server: Server, cache: Path, tmp_path: Path
) -> None:
    beside = distill(
        replace(stage, teacher=str(server.model), teacher_cache=str(cache)), tmp_path / "beside", show=False
    )
    alone = distill(replace(stage, teacher=None, teacher_cache=str(cache)), tmp_path / "alone", show=False)
    assert same(beside.out, alone.out)
    assert value(alone, "alone", "bits_per_byte") == pytest.approx(value(beside, "beside", "bits_per_byte"), rel=1e-5)
    assert "teacher" not in alone.measures
    assert alone.card.parents[1].digest == beside.card.parents[1].digest
    assert alone.card.parents[1].name == str(server.model)
    readme = (alone.out / "README.md").read_text()
    assert "forward kl to the teacher of the cache `cache`" in readme
    assert "its weights were not here" in readme
    assert "the cache was made with this tokenizer" in readme
    assert "None" not in readme


def test_a_teacher_that_is_not_found_is_stood_for_by_its_cache(
    stage: DistillConfig, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = replace(stage, teacher=str(tmp_path / "gone"), teacher_cache=str(cache))
    distill(gone, tmp_path / "made", show=False)
    assert "gone is not here; its cache replaces it in training" in capsys.readouterr().err
    with pytest.raises(NotFound, match="gone"):
        distill(replace(gone, student=None, keep=0.755), tmp_path / "cut", show=False)


def test_a_student_with_another_tokenizer_than_the_caches_is_refused(
    stage: DistillConfig, cache: Path, student: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_tokenizer.eos_token = "a"
    tiny_tokenizer.save_pretrained(student)
    with pytest.raises(CacheMismatch, match="was made with tokenizer"):
        distill(replace(stage, teacher=None, teacher_cache=str(cache)), tmp_path / "made", show=False)


# what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": None}, "no teacher is given"),
        ({"student": None, "keep": 0.5}, r"not loaded here; give --student, .*potstill prune"),
        ({"teacher": None, "teacher_cache": "c", "student": None, "params": 9}, "not loaded here; give --student"),
        ({"teacher_cache": "c"}, "give one of them"),
        ({"objective": ObjectiveConfig(temperature=2.0)}, "--temperature is 2"),
        ({"objective": ObjectiveConfig(name="adaptive_kl")}, "adaptive_kl"),
        ({"objective": ObjectiveConfig(name="cross_entropy")}, "uses no teacher"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"top_k": 64, "teacher": None, "teacher_cache": "c"}, "--top-k applies to a served teacher"),
        ({"top_k": 64, "teacher": "smollm2"}, "no teacher here is served"),
        ({"teacher": "http://me:secret@host/v1"}, "POTSTILL_API_KEY"),
    ],
)
def test_what_cannot_be_learnt_from_afar_is_refused_before_anything_is_read(
    stage: DistillConfig, change: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        replace(stage, **change)  # type: ignore[arg-type]


def test_only_distill_learns_from_a_server(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="only distill can use a server"):
        CacheTeacherConfig(teacher=URL).run(tmp_path / "cache", show=False)


def test_no_name_of_a_model_is_taken_for_an_address(tmp_path: Path) -> None:
    names = ("smollm2", "org/http", str(tmp_path), "model.gguf", None)
    assert not any(is_address(name) for name in names)
    assert is_address(URL)
    assert is_address("HTTPS://host/v1")
