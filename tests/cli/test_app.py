"""What verbs print: one JSON document for machines, tables for people, all else on stderr."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from tests.cli.conftest import KEEP, TINY, Call
from tests.serving import Server
from tests.stages.world import interrupted

from potstill.cli.app import app, silence_warnings
from potstill.cli.options import get_number_types, merge_options
from potstill.core.errors import UsageError
from potstill.core.screen import Verbosity, set_verbosity
from potstill.recipes import registry
from potstill.stages.distill.config import DistillConfig
from potstill.train.config import TrainConfig

MEASURES = {
    "bits_per_byte",
    "perplexity",
    "teacher_kl",
    "teacher_agreement",
    "acceptance",
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


def test_a_dry_run_says_what_a_run_takes_and_writes_only_its_options(
    asked: Any, potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    made = tmp_path / "made"
    found = asked(*distill(teacher, text, made), "--dry-run")
    assert found["stage"]["settings"]["tokens"] == found["training"]["tokens"] == 512
    assert (found["teacher"], found["data"]["columns"]) == ([str(teacher)], ["text"])
    assert found["student"]["layers"] == 2
    assert found["training"]["steps"] == 2
    assert found["training"]["passes"] == pytest.approx(512 / found["data"]["tokens"])
    assert 0 < found["disk"]["final"] < found["disk"]["most"] < found["disk"]["free"]
    assert found["memory"]["peak"] > 0
    assert found["objective"] == "0.7 * cross_entropy + 0.3 * forward_kl"
    shown = potstill(*distill(teacher, text, made), "--dry-run").out
    assert "training.steps" in shown
    assert f"potstill distill --config {made}.yaml runs this" in shown.replace("\n", "")
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "made.yaml"}
    (tmp_path / "made.yaml").write_text("teacher: smollm2\n")
    answer = potstill(*distill(teacher, text, made), "--dry-run", "--json")
    assert json.loads(answer.out)["config"] is None
    assert "is your own file" in answer.err
    assert (tmp_path / "made.yaml").read_text() == "teacher: smollm2\n"


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="tokens"),
        pytest.param(("--epochs", 0.5, "--lora", 2, "--objective", "jsd:beta=0.3"), id="epochs and a method"),
    ],
)
def test_the_options_of_a_dry_run_give_the_same_run(
    asked: Any, teacher: Path, text: Path, tmp_path: Path, more: tuple[object, ...]
) -> None:
    call = ["distill", "--teacher", teacher, "--keep", KEEP, "--data", text, "--context", 64, "--batch-tokens", 256]
    call += ["--dtype", "float32", "--documents", 3, *more, *(() if "--epochs" in more else ("--tokens", 512))]
    planned = asked(*call, "--out", tmp_path / "made", "--dry-run")
    direct = asked(*call, "--out", tmp_path / "direct")
    again = asked("distill", "--config", tmp_path / "made.yaml")
    assert again["out"] == str(tmp_path / "made")
    for part in ("stage", "parents", "data", "details"):
        assert again[part] == direct[part], part
    assert again["cost"]["losses"] == direct["cost"]["losses"]
    assert planned["stage"] == direct["stage"]
    assert (planned["training"]["steps"], planned["data"]["tokens"]) == (
        direct["cost"]["steps"],
        direct["data"]["tokens"],
    )
    student = planned["student"]
    assert student.pop("parameters") == direct["details"]["parameters"]
    assert {name: size for name, size in student.items() if name != "model"} == direct["details"]["shape"]


def test_every_command_that_writes_a_folder_has_a_dry_run_that_its_config_takes(
    asked: Any, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    made, read = tmp_path / "made", ("--data", pairs)
    pruned = asked("prune", teacher, "--keep", KEEP, *read, "--out", made, "--dry-run")
    assert (pruned["student"]["layers"], pruned["data"]["columns"]) == (2, ["prompt", "response"])
    assert asked("prune", "--config", f"{made}.yaml", "--dry-run") == pruned
    cached = asked("cache", "--teacher", teacher, *read, "--context", 64, "--out", made, "--dry-run")
    assert 0 < cached["data"]["rows"] < cached["data"]["tokens"]
    assert asked("cache", "--config", f"{made}.yaml", "--dry-run") == cached
    answers = asked("generate", teacher, *read, "--documents", 5, "--out", made, "--dry-run")
    assert answers["data"]["prompts"] == 5
    assert asked("generate", "--config", f"{made}.yaml", "--dry-run") == answers
    (more := tmp_path / "more.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    both, single = (
        asked("generate", teacher, *read, *rest, "--out", made, "--dry-run") for rest in (["--data", more], [])
    )
    assert both["data"]["prompts"] > single["data"]["prompts"]
    measured = asked("measure", teacher, *read, "--out", made, "--dry-run")
    assert measured["model"] == {str(teacher): str(teacher)}
    assert asked("measure", "--config", f"{made}.yaml", "--dry-run") == measured
    recipe = asked("run", "minima", "--tiny", "--out", made, "--dry-run")
    assert len(recipe["stages"]) == 2
    assert asked("run", "--config", f"{made}.yaml", "--dry-run") == recipe
    assert not made.exists()


def test_a_dry_run_refuses_what_the_run_would_refuse(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").touch()
    for words, message in (
        (("--out", tmp_path / "made"), "is not empty"),
        (("--out", tmp_path / "new", "--eval-data", "nowhere.jsonl"), "there is no file or folder nowhere.jsonl"),
        (("--out", tmp_path / "new", "--context", 1024, "--batch-tokens", 1024), "takes 512 tokens"),
        (("--out", tmp_path / "new", "--tokens", 5, "--epochs", 1), "tokens and epochs both say"),
    ):
        call = ("distill", "--teacher", teacher, "--keep", KEEP, "--data", text, *words, "--dry-run")
        answer = potstill(*call)
        assert answer.code, answer.out
        assert message in answer.err
    assert not (tmp_path / "new.yaml").exists()


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
def plan(tmp_path: Path) -> Any:
    """The stage that `distill --config` with a file of this text would run; its models need not exist."""

    def call(content: str, *more: object) -> Any:
        (tmp_path / "run.yaml").write_text(content)
        arguments = ["--out", tmp_path / "made", "--config", tmp_path / "run.yaml", *more]
        command: Any = typer.main.get_command(app)
        with command.commands["distill"].make_context("distill", list(map(str, arguments))) as context:
            options = merge_options(context, str(tmp_path / "run.yaml"), get_number_types(TrainConfig))
        return json.loads(json.dumps(DistillConfig.from_options(options).to_dict()))

    return call


def test_a_config_holds_options_and_the_command_line_wins(plan: Any) -> None:
    content = "teacher: smollm2\nkeep: 0.5\ntokens: 2M\nlr: 1e-4\neval-every: 5\nobjective: jsd:beta=0.3\n"
    found = plan(content)
    assert (found["teacher"], found["keep"], found["settings"]["tokens"]) == ("smollm2", 0.5, 2_000_000)
    assert (found["settings"]["learning_rate"], found["settings"]["eval_every"]) == (1e-4, 5)
    assert found["objective"]["options"] == {"beta": 0.3}
    found = plan(content, "--tokens", "1k", "--params", "60M")
    assert (found["keep"], found["params"], found["settings"]["tokens"]) == (None, 60_000_000, 1000)


def test_tokens_and_epochs_replace_each_other_and_cannot_stand_together(plan: Any) -> None:
    length = plan("teacher: smollm2\nkeep: 0.5\ntokens: 2M\n", "--num-train-epochs", 3)["settings"]
    assert (length["tokens"], length["epochs"]) == (None, 3.0)
    length = plan("teacher: smollm2\nkeep: 0.5\nnum_train_epochs: 0.5\n")["settings"]
    assert (length["tokens"], length["epochs"]) == (None, 0.5)
    with pytest.raises(UsageError, match="tokens and epochs both say how long to train; give one of them"):
        plan("teacher: smollm2\nkeep: 0.5\ntokens: 2M\nepochs: 3\n")


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
