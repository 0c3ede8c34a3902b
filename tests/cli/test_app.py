"""What verbs print: one JSON document for machines, tables for people, all else on stderr."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import KEEP, TINY, Call
from tests.serving import Server
from tests.stages.world import interrupted

from potstill.cli.app import silence_warnings
from potstill.core.screen import Verbosity, set_verbosity
from potstill.recipes import registry

MEASURES = {
    "bits_per_byte",
    "perplexity",
    "teacher_kl",
    "teacher_agreement",
    "rouge_l",
    "parameters",
    "bytes",
    "bfloat16_bytes",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
}


ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def asked(potstill: Call) -> Any:
    """`potstill ARGUMENTS... --json` goes well and prints one JSON document."""

    def call(*arguments: object) -> Any:
        answer = potstill(*arguments, "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out, parse_constant=pytest.fail)

    return call


def test_what_the_logger_reports_is_a_line_of_stderr_on_rank_0_and_not_with_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("potstill")
    monkeypatch.setattr(logger, "handlers", [])
    silence_warnings()
    silence_warnings()
    logger.warning("note: %s fails", "it")
    set_verbosity(Verbosity.QUIET)
    logger.warning("note: hidden")
    set_verbosity(Verbosity.NORMAL)
    monkeypatch.setenv("RANK", "1")
    logger.warning("note: of another rank")
    assert capsys.readouterr().err == "note: it fails\n"


def test_models_names_the_packaged_one(asked: Any, potstill: Call) -> None:
    assert "smollm2" in [model["name"] for model in asked("models")]
    assert "smollm2" in potstill("models").out


def test_doctor_prints_its_checks_and_its_exit_code_is_the_verdict(
    asked: Any, potstill: Call, pairs: Path, teacher: Path
) -> None:
    checks = asked("doctor", "--teacher", teacher, "--data", pairs, "--context", 64)["checks"]
    assert {check["outcome"] for check in checks} == {"pass"}
    assert {"shared vocabulary", "stop token", "zero loss for a copy"} <= {check["name"] for check in checks}
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": ENDLESS}))
    (teacher / "chat_template.jinja").write_text(ENDLESS)
    answer = potstill("doctor", "--teacher", teacher, "--data", pairs, "--context", 64, "--json")
    assert answer.code == 1
    assert [check["name"] for check in json.loads(answer.out)["checks"] if check["outcome"] == "fail"] == ["stop token"]
    assert "to do: give a chat template" in potstill("doctor", "--teacher", teacher, "--data", pairs).out


def test_data_says_what_is_trained(asked: Any, potstill: Call, pairs: Path, teacher: Path) -> None:
    found = asked("data", pairs, "--tokenizer", teacher, "--split", "all")
    assert found["kind"] == "pairs"
    assert found["documents"] == 60
    assert 0 < found["trained_share"] < 0.5
    assert list(found["last_trained"]) == ["<|im_end|>"]
    assert "It is" in potstill("data", pairs, "--tokenizer", teacher, "--show").out
    assert "It is" not in potstill("data", pairs, "--tokenizer", teacher).out


def test_distill_learns_from_a_server(asked: Any, server: Server, text: Path, tmp_path: Path) -> None:
    call = ("distill", "--teacher", server.url, "--student", server.model, "--data", text, *TINY, "--documents", 2)
    found = asked(*call, "--top-k", 5, "--out", tmp_path / "made")
    assert (found["stage"]["teacher"], found["stage"]["top_k"]) == (server.url, 5)
    assert (tmp_path / "made" / "model.safetensors").is_file()


def test_measure_names_every_measure_of_every_model(asked: Any, pairs: Path, teacher: Path, tmp_path: Path) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    file = tmp_path / "measures.json"
    call = ("measure", teacher, other, "--teacher", teacher, "--data", pairs, "--prompts", 2, "--context", 128)
    found = asked(*call, "--out", file)
    assert list(found["models"]) == [str(teacher), str(other)]
    for measures in found["models"].values():
        assert {m["name"] for m in measures} >= MEASURES
        assert all({"name", "value", "unit", "n"} <= set(m) for m in measures)
    assert json.loads(file.read_text())["models"].keys() == found["models"].keys()


def test_generate_answers(asked: Any, potstill: Call, teacher: Path) -> None:
    found = asked("generate", teacher, "--prompt", "Hi", "--max-tokens", 4)
    assert found["prompt"] == "Hi"
    assert isinstance(found["text"], str)
    assert potstill("generate", teacher, "--prompt", "Hi", "--max-tokens", 4).out == found["text"] + "\n"


def test_answers_to_a_data_set_can_be_rehearsed(asked: Any, teacher: Path, pairs: Path, tmp_path: Path) -> None:
    found = asked("generate", teacher, "--data", pairs, "--out", tmp_path / "made", "--documents", 5, "--dry-run")
    assert (found["stage"], found["data"], found["documents"]) == ("answers", str(pairs), 5)
    assert not (tmp_path / "made").exists()


def test_recipes_list_their_sources_and_cite_them(asked: Any, potstill: Call) -> None:
    assert [recipe["name"] for recipe in asked("recipes")] == registry.list_recipe_names()
    assert "arXiv:2311.07052" in potstill("recipes").out
    assert potstill("recipes", "minima", "--cite").out.startswith("@article{zhang2023law")
    assert "settings.learning_rate" in potstill("recipes", "minima").out


def distill(teacher: Path, text: Path, out: Path) -> tuple[object, ...]:
    return ("distill", "--teacher", teacher, "--keep", KEEP, "--data", text, "--out", out, *TINY)


def test_distill_tells_machines_its_card_and_people_its_measures(
    asked: Any, potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    found = asked(*distill(teacher, text, tmp_path / "made"))
    assert found["out"] == str(tmp_path / "made")
    assert {k: v for k, v in found.items() if k != "out"} == json.loads((tmp_path / "made" / "card.json").read_text())
    answer = potstill(*distill(teacher, text, tmp_path / "made"), "--overwrite")
    assert "bits per byte" in answer.out
    assert "training made, 2 steps" in answer.err
    quiet = potstill(*distill(teacher, text, tmp_path / "made"), "--overwrite", "--quiet")
    assert all(line.startswith("warning: ") for line in quiet.err.splitlines()), quiet.err


def test_a_dry_run_writes_nothing_and_states_every_default(
    asked: Any, potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    found = asked(*distill(teacher, text, tmp_path / "made"), "--dry-run")
    assert found["settings"]["tokens"] == 512
    assert found["objective"]["name"] == "forward_kl"
    assert asked("prune", teacher, "--keep", KEEP, "--out", tmp_path / "made", "--dry-run")["keep"] == KEEP
    assert len(asked("run", "minima", "--out", tmp_path / "made", "--dry-run")["stages"]) == 2
    assert "settings.tokens" in potstill(*distill(teacher, text, tmp_path / "made"), "--dry-run").out
    assert set(tmp_path.rglob("*")) == before


def test_an_interrupted_run_says_the_command_that_continues_it(
    potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    words = list(distill(teacher, text, tmp_path / "made"))
    words[words.index("--tokens") + 1] = "4k"
    call = (*words, "--overwrite")
    with interrupted(tmp_path / "made"):
        answer = potstill(*call)
    assert answer.code == 130
    said = answer.err.splitlines()[-1].split(": ")[-1].split()
    assert said[0] == "potstill"
    assert "--overwrite" not in said
    assert said[-1] == "--resume"
    again = potstill(*said[1:])
    assert again.code == 0, again.err
    assert not (tmp_path / "made" / "training").exists()


# --config


@pytest.fixture
def plan(asked: Any, teacher: Path, text: Path, tmp_path: Path) -> Any:
    """What `distill --config` with a file of this text would do."""

    def call(content: str, *more: object) -> Any:
        (tmp_path / "run.yaml").write_text(content)
        return asked("distill", "--out", tmp_path / "made", "--config", tmp_path / "run.yaml", "--dry-run", *more)

    return call


def test_a_config_holds_options_and_the_command_line_wins(plan: Any) -> None:
    content = "teacher: smollm2\nkeep: 0.5\ntokens: 2M\nlr: 1e-4\neval-every: 5\nobjective: jsd:beta=0.3\n"
    found = plan(content)
    assert (found["teacher"], found["keep"], found["settings"]["tokens"]) == ("smollm2", 0.5, 2_000_000)
    assert (found["settings"]["learning_rate"], found["settings"]["eval_every"]) == (1e-4, 5)
    assert found["objective"]["options"] == {"beta": 0.3}
    found = plan(content, "--tokens", "1k", "--params", "60M")
    assert (found["keep"], found["params"], found["settings"]["tokens"]) == (None, 60_000_000, 1000)


def test_several_teachers_are_a_list_in_a_config_and_one_may_be_a_list_too(plan: Any) -> None:
    several = plan("teacher: [smollm2, own=pruned]\nstudent: pruned\ncombine: confidence\n")
    assert (several["teacher"], several["combine"]) == (["smollm2", "own=pruned"], "confidence")
    assert plan(json.dumps(several)) == several
    assert plan("teacher: [smollm2]\nkeep: 0.5\n")["teacher"] == "smollm2"
    given = plan("student: pruned\n", "--teacher", "a=x", "--teacher", "b=y", "--combine", "route:subject")
    assert given["teacher"] == ["a=x", "b=y"]


@pytest.mark.parametrize("whole", [True, False], ids=["a card", "the stage in a card"])
def test_a_config_takes_what_a_card_holds(plan: Any, asked: Any, whole: bool) -> None:
    stage = plan("teacher: smollm2\nkeep: 0.5\nobjective: jsd:beta=0.3\nlora: 4\ndocuments: 7\nwarmup: 0.2\nclip: 3\n")
    assert (stage["documents"], stage["settings"]["warmup"], stage["settings"]["clip"]) == (7, 0.2, 3.0)
    assert plan(json.dumps({"stage": stage, "seed": 1} if whole else stage)) == stage


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param("tokenz: 2M\n", "'tokenz', which is not an option", id="an unknown name"),
        pytest.param("settings: {hope: 1}\n", "'hope', which is not an option", id="an unknown setting"),
        pytest.param("overwrite: true\n", "'overwrite', which is not an option", id="what belongs to the call"),
        pytest.param("keep: half\n", "sets keep to 'half'", id="a word for a number"),
        pytest.param("warmup: [1]\n", "sets warmup to [1]", id="a list for a number"),
        pytest.param("- tokens\n", "option names to values", id="no names"),
        pytest.param("a: b: c\n", "is not valid YAML", id="no YAML"),
        pytest.param("3: 4\n", "option names to values", id="numbers for names"),
    ],
)
def test_a_config_that_cannot_be(potstill: Call, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    answer = potstill(
        "distill", "--teacher", "smollm2", "--out", tmp_path / "made", "--config", tmp_path / "run.yaml", "--dry-run"
    )
    assert answer.code == 2
    assert said in answer.err


def test_a_process_that_is_told_to_end_clears_up_like_one_that_is_interrupted() -> None:
    program = (
        "import os, signal, sys; from potstill.cli import app; sys.argv = ['potstill', 'models']; "
        "app.run_command = lambda _: (os.kill(os.getpid(), signal.SIGTERM), signal.pause()); app.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "stopped; potstill left no unfinished files\n")
