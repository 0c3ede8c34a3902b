"""What is wrong with a call is said in one sentence, with exit code 1 or 2, and nothing half-written stays behind."""

import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import KEEP, TINY, Answer, Call
from tests.stages.world import interrupted, saved, written
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.cli.app import main
from potstill.core.errors import NotFound

Refused = Callable[..., str]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def sentence(answer: Answer, *, code: int) -> str:
    """The one sentence that a call that went wrong says at its end, without the word `error: `."""
    assert answer.code == code, answer
    assert answer.out == ""
    *progress, last = answer.err.splitlines()
    assert last.startswith("error: "), answer.err
    assert not any("rror:" in line for line in progress), answer.err
    assert "Traceback" not in answer.err
    return last.removeprefix("error: ").strip()


@pytest.fixture
def refused(potstill: Call, tmp_path: Path) -> Refused:
    """`potstill ARGUMENTS...` goes wrong, says why in one sentence, and leaves every file and folder as it was."""

    def call(*arguments: object, code: int) -> str:
        before = files(tmp_path)
        said = sentence(potstill(*arguments), code=code)
        assert files(tmp_path) == before
        return said

    return call


def distill(teacher: object, data: object, out: Path, *more: object) -> tuple[object, ...]:
    size = () if {"--student", "--params", "--keep"} & set(more) else ("--keep", KEEP)
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    tiny = [word for pair in pairs if pair[0] not in more for word in pair]
    return ("distill", "--teacher", teacher, "--data", data, "--out", out / "made", *tiny, *size, *more)


# models


@pytest.mark.parametrize("name", ["nowhere/at/all", "nowhere.gguf", "no-such-owner/no-such-model", "with space"])
def test_a_model_that_is_not_there(refused: Refused, text: Path, tmp_path: Path, name: str) -> None:
    assert name.split("/")[-1] in refused(*distill(name, text, tmp_path), code=2)


def test_a_folder_that_is_no_model(refused: Refused, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(*distill(tmp_path / "empty", text, tmp_path), code=2)


def test_a_file_that_is_no_gguf(refused: Refused, text: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(os.urandom(64))
    assert "junk.gguf" in refused(*distill(tmp_path / "junk.gguf", text, tmp_path), code=1)


def test_weights_that_were_cut_short(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "half-written" in refused(*distill(teacher, text, tmp_path), code=1)


def test_pickled_weights_run_only_when_asked_for(
    refused: Refused, potstill: Call, teacher: Path, tiny_llama: LlamaForCausalLM, text: Path, tmp_path: Path
) -> None:
    (teacher / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), teacher / "pytorch_model.bin")
    assert "--allow-pickle" in refused(*distill(teacher, text, tmp_path), code=2)
    assert "--allow-pickle" in refused("prune", teacher, "--keep", KEEP, "--out", tmp_path / "made", code=2)
    call = ("prune", teacher, "--keep", KEEP, "--data", text, "--out", tmp_path / "made", "--allow-pickle")
    assert potstill(*call).code == 0


def test_code_that_comes_with_a_model_does_not_run(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (teacher / "config.json").write_text(json.dumps(config))
    (teacher / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "--trust-remote-code" in refused(*distill(teacher, text, tmp_path), code=2)
    assert not (tmp_path / "ran").exists()


def test_a_permuted_vocabulary_of_the_same_width(
    refused: Refused,
    teacher: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
) -> None:
    table = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    words = table["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    student = saved(tmp_path / "student", tiny_llama, tiny_tokenizer)
    (student / "tokenizer.json").write_text(json.dumps(table))
    said = refused(*distill(teacher, text, tmp_path, "--student", student), code=2)
    assert "different ids" in said


def test_a_vocabulary_padded_to_another_width_simply_works(
    potstill: Call,
    teacher: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: Path,
    tmp_path: Path,
) -> None:
    tiny_llama.resize_token_embeddings(320, mean_resizing=False)
    student = saved(tmp_path / "student", tiny_llama, tiny_tokenizer)
    answer = potstill(*distill(teacher, text, tmp_path, "--student", student))
    assert answer.code == 0, answer.err
    card = json.loads((tmp_path / "made" / "card.json").read_text())
    assert {"name": "shared vocabulary", "outcome": "pass: 259 ids shared; cut to them: student's head of 320"} in card[
        "invariants"
    ]


def test_a_second_teacher_does_not_take_the_place_of_the_first(refused: Refused, teacher: Path, text: Path) -> None:
    two = ("--teacher", teacher, "--teacher", f"b={teacher}", "--data", text)
    assert "you gave 2; give one" in refused("cache", *two, "--out", "made", code=2)
    assert "cross_entropy uses no teacher" in refused("arena", *two, "--keep", 0.5, "--out", "made", code=2)


# data


def test_data_that_is_not_there(refused: Refused, teacher: Path, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in refused(*distill(teacher, tmp_path / "nowhere.jsonl", tmp_path), code=2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        pytest.param("empty.jsonl", b"", "empty", id="an empty file"),
        pytest.param("empty.txt", b" \n\n", "empty", id="a text of blanks"),
        pytest.param("columns.jsonl", b'{"title": "a", "year": 1}\n', "`title`, `year`", id="wrong columns"),
        pytest.param("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2", id="invalid JSON"),
        pytest.param("junk.txt", bytes(range(256)) * 8, "binary", id="binary junk"),
        pytest.param("junk.jsonl", b"\x89PNG\r\n\x1a\n\xff\xfe", "not UTF-8", id="an image named jsonl"),
        pytest.param("cut.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 99)[:-12], "gzip", id="half a gzip file"),
        pytest.param("table.csv", b"title,year\na,1\n", "`title`, `year`", id="a table of something else"),
        pytest.param("none.jsonl", b'{"text": ""}\n' * 3, "empty text", id="documents without a letter"),
        pytest.param("picture.png", b"\x89PNG", "none of", id="no format of text"),
    ],
)
def test_data_that_cannot_be_read(
    refused: Refused, teacher: Path, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(*distill(teacher, tmp_path / name, tmp_path), code=1)
    assert said in refused("measure", teacher, "--data", tmp_path / name, code=1)
    assert said in refused("data", tmp_path / name, "--tokenizer", teacher, code=1)


def test_a_text_that_tokenises_to_nothing(refused: Refused, teacher: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[a-z ]+"}, "content": ""}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = written(tmp_path / "lower.jsonl", [{"text": "nothing of this is left " * n} for n in range(1, 90)])
    assert "tokenizes to nothing" in refused(*distill(teacher, data, tmp_path), code=1)


def test_a_chat_without_an_answer(refused: Refused, teacher: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "chat.jsonl", [{"prompt": f"{n}?", "response": ""} for n in range(40)])
    assert "empty response" in refused(*distill(teacher, data, tmp_path), code=1)


# sizes and options


@pytest.mark.parametrize("keep", ["0", "-0.5", "1.5", "nan", "inf"])
def test_a_share_outside_zero_to_one(refused: Refused, teacher: Path, text: Path, tmp_path: Path, keep: str) -> None:
    assert "at most 1" in refused(*distill(teacher, text, tmp_path, "--keep", keep), code=2)
    assert "at most 1" in refused("prune", teacher, "--keep", keep, "--out", tmp_path / "made", code=2)


def test_a_target_larger_than_the_teacher(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    assert "more than the" in refused(*distill(teacher, text, tmp_path, "--params", "60M"), code=2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        pytest.param(("--params", "9k", "--student", "x"), "--student and --params", id="two sizes"),
        pytest.param(("--keep", "x"), "--keep", id="no number"),
        pytest.param(("--params", "many"), "not a count", id="is not a count"),
        pytest.param(("--tokens", "0"), "not a count", id="no token"),
        pytest.param(("--objective", "hope"), "there is no objective 'hope'", id="an unknown objective"),
        pytest.param(("--objective", "jsd:gamma=1"), "no option 'gamma'", id="an unknown option of an objective"),
        pytest.param(("--objective", "jsd:beta"), "NAME:OPTION=NUMBER", id="an option without a value"),
        pytest.param(("--temperature", "0"), "must be positive", id="no temperature"),
        pytest.param(("--cross-entropy", "2"), "between 0 and 1", id="more than all of the loss"),
        pytest.param(("--strategy", "hope"), "none of auto, depth", id="an unknown strategy"),
        pytest.param(("--dtype", "int3"), "there is no dtype 'int3'", id="an unknown dtype"),
        pytest.param(("--device", "abacus"), "cannot be used here", id="an unknown device"),
        pytest.param(
            ("--context", "4096", "--batch-tokens", "4096"),
            "longer than the 512 tokens",
            id="a context longer than the model's",
        ),
        pytest.param(("--context", "0"), "at least 1", id="no context"),
        pytest.param(("--lr", "-1"), "between 0 and 1", id="a negative rate"),
        pytest.param(("--lora", "-1"), "a rank", id="a negative rank"),
        pytest.param(("--train", "["), "no regular expression", id="no pattern of names"),
        pytest.param(("--train", "router"), "matches no parameter", id="no parameter of that name"),
        pytest.param(("--train", "norm", "--lora", "2"), "omit one of them", id="adapters and other weights"),
        pytest.param(("--patience", "2"), "eval_every", id="patience without evaluations"),
        pytest.param(("--report-to", "a-pigeon"), "a-pigeon", id="an unknown tracker"),
        pytest.param(("--resume", "--overwrite"), "give one of them", id="continued and discarded"),
        pytest.param(("--hope",), "there is no option --hope", id="an unknown option"),
        pytest.param(("--config", "nowhere.yaml"), "no file nowhere.yaml", id="a config that is not there"),
    ],
)
def test_options_that_cannot_be(
    refused: Refused, teacher: Path, text: Path, tmp_path: Path, more: tuple[str, ...], said: str
) -> None:
    assert said in refused(*distill(teacher, text, tmp_path, *more), code=2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        pytest.param(("distil",), "No such command 'distil'", id="an unknown verb"),
        pytest.param(("distill",), "Missing option '--out'", id="a missing option"),
        pytest.param(("distill", "--out", "x", "--keep", ".5"), "no teacher is given", id="no teacher"),
        pytest.param(("run", "hope", "--out", "x"), "no recipe 'hope'", id="an unknown recipe"),
        pytest.param(("recipes", "hope"), "no recipe 'hope'", id="an unknown recipe to show"),
        pytest.param(("generate", "x", "--prompt", "a", "--max-tokens", "0"), "at least 1", id="no token to write"),
        pytest.param(("generate", "x", "--prompt", "a", "--temperature", "-1"), "at least 0", id="below greedy"),
        pytest.param(("generate", "x"), "--prompt for one answer", id="nothing to answer"),
        pytest.param(("generate", "x", "--data", "d"), "--data and --out", id="no folder for answers"),
        pytest.param(("measure", "a", "a"), "named twice", id="a model named twice"),
        pytest.param(("measure", "a", "--out", "no/such/file.json"), "no folder", id="measures into no folder"),
        pytest.param(("measure", "a", "--out", "."), "is a folder", id="measures into a folder"),
        pytest.param(("distill", "--out", "x", "--teacher", "a", "--keep", "1", "--seed", "-1"), "seed", id="a seed"),
        pytest.param(("frontier", "a", "--out", "no/such/page.html"), "no folder", id="a chart into no folder"),
        pytest.param(("frontier", "nowhere"), "nowhere", id="a chart of nothing"),
        pytest.param(("data", "stdlib", "--split", "hope"), "hope", id="an unknown split"),
    ],
)
def test_calls_that_cannot_be(refused: Refused, call: tuple[str, ...], said: str) -> None:
    assert said in refused(*call, code=2)


def test_an_empty_prompt(refused: Refused, teacher: Path) -> None:
    assert "no token" in refused("generate", teacher, "--prompt", "", code=1)


def test_a_prompt_longer_than_the_context(refused: Refused, teacher: Path) -> None:
    assert "512 tokens" in refused("generate", teacher, "--prompt", "long " * 120, "--max-tokens", 8, code=2)


# folders


def test_an_output_folder_that_holds_something(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "thesis.tex").write_text("years of work")
    for call in (distill(teacher, text, tmp_path), ("prune", teacher, "--keep", KEEP, "--out", tmp_path / "made")):
        assert "--overwrite" in refused(*call, code=2)
    assert "nothing to resume" in refused(*distill(teacher, text, tmp_path, "--resume"), code=2)
    assert "--overwrite" in refused("run", "minima", "--tiny", "--out", tmp_path / "made", code=2)
    assert (tmp_path / "made" / "thesis.tex").read_text() == "years of work"


def test_an_output_folder_that_is_a_file(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "made").write_text("a file")
    assert "is a file" in refused(*distill(teacher, text, tmp_path), code=2)
    assert "is a file" in refused(*distill(teacher, text, tmp_path, "--overwrite"), code=2)


def test_an_output_folder_inside_a_file(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    assert "file" in refused(*distill(teacher, text, tmp_path / "file"), code=1)


def test_an_output_folder_where_no_one_may_write(refused: Refused, teacher: Path, text: Path) -> None:
    assert "/proc/made" in refused(*distill(teacher, text, Path("/proc")), code=1)
    assert "/proc/made" in refused("prune", teacher, "--keep", KEEP, "--data", text, "--out", "/proc/made", code=1)


def test_a_folder_that_may_not_be_written(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "no permission" in refused(*distill(teacher, text, tmp_path / "locked"), code=1)


def test_what_is_read_is_never_written_over(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    call = ("distill", "--teacher", teacher, "--keep", KEEP, "--data", text, "--overwrite", *TINY)
    assert "an input of this command" in refused(*call, "--out", teacher, code=2)
    assert "an input of this command" in refused(*call, "--out", tmp_path, code=2)
    assert "an input of this command" in refused(
        "prune", teacher, "--keep", KEEP, "--out", teacher, "--overwrite", code=2
    )


@pytest.fixture
def stopped(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> tuple[object, ...]:
    """The call of a run that was stopped on its way, with a checkpoint."""
    call = distill(teacher, text, tmp_path, "--tokens", "4k")
    with interrupted(tmp_path / "made"):
        answer = potstill(*call)
    assert answer.code == 130, answer
    return call


def test_a_half_written_checkpoint(refused: Refused, stopped: tuple[object, ...], tmp_path: Path) -> None:
    for manifest in (tmp_path / "made").rglob("manifest.json"):
        manifest.unlink()
    assert "was not finished" in refused(*stopped, "--resume", code=1)


def test_a_corrupt_checkpoint(refused: Refused, stopped: tuple[object, ...], tmp_path: Path) -> None:
    for file in (tmp_path / "made" / "training").glob("checkpoint-*/model.safetensors"):
        file.write_bytes(b"\0" + file.read_bytes()[1:])
    assert "missing or altered" in refused(*stopped, "--resume", code=1)


def test_a_checkpoint_of_another_run(refused: Refused, stopped: tuple[object, ...]) -> None:
    assert "begun with lr 0.0005, and now it is 0.1; give what it was" in refused(
        *stopped, "--resume", "--lr", "0.1", code=2
    )


def test_an_unfinished_run_is_not_discarded_silently(refused: Refused, stopped: tuple[object, ...]) -> None:
    assert "--resume" in refused(*stopped, code=2)


# disks


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can grow over `size` bytes: writing more fails as on a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [30_000, 120_000], ids=["no room for the model", "no room for the optimiser"])
def test_a_full_disk(refused: Refused, teacher: Path, text: Path, tmp_path: Path, size: int) -> None:
    with disk_of(size):
        assert "writ" in refused(*distill(teacher, text, tmp_path / "deep" / "down"), code=1)


def test_a_full_disk_while_pruning(refused: Refused, teacher: Path, text: Path, tmp_path: Path) -> None:
    with disk_of(30_000):
        call = ("prune", teacher, "--keep", KEEP, "--data", text, "--out", tmp_path / "deep" / "made")
        assert "writing" in refused(*call, code=1)


def test_a_disk_that_is_full_only_at_the_end_keeps_what_was_trained(
    potstill: Call, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = distill(teacher, text, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("potstill.stages.saved_model.save_model", full)
        assert "No space left" in sentence(potstill(*call), code=1)
    assert files(tmp_path / "made") >= {"training/metrics.jsonl"}
    answer = potstill(*call, "--resume")
    assert answer.code == 0, answer.err
    assert "model.safetensors" in files(tmp_path / "made")


# the rest


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["potstill", "recipes", "--debug", "hope"])
    with pytest.raises(NotFound):
        main()


def test_a_real_shell_sees_one_sentence_and_the_exit_code() -> None:
    call = [sys.executable, "-m", "potstill", "frontier", "nowhere"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert "nowhere" in sentence(Answer(done.returncode, done.stdout, done.stderr), code=2)


def test_what_no_one_foresaw_is_one_sentence_too(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a wheel\ncame off")

    monkeypatch.setattr("potstill.recipes.listing.list_recipe_facts", broken)
    assert refused("recipes", code=1) == "RuntimeError: a wheel came off (--debug shows where)"
