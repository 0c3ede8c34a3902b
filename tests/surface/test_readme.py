"""What the README shows works: its table is that of one measurement, its commands and its Python run."""

import copy
import importlib.util
import io
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import typer.main
from tests.models.small import SMALL
from tests.stages.world import saved
from tests.tiny import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import potstill
from potstill.cli.app import app, main
from potstill.core.measure_table import MEASURES
from potstill.layers.ffn.experts import Experts
from potstill.layers.mixers.delta_net import DeltaNet
from potstill.models.families.registry import FAMILIES

ROOT = Path(__file__).parents[2]
GROUP: Any = typer.main.get_command(app)
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def load_script(name: str) -> Any:
    """A script of docs/, under its own name, since one imports the other."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures, decode_figures = load_script("readme_figures"), load_script("decode_figures")
MEASUREMENT = json.loads(figures.MEASUREMENT.read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


LINES = [line.split(" #")[0].rstrip() for block in blocks("sh") for line in block.splitlines() if line]
COMMANDS = [line for line in LINES if line.startswith("potstill ")]


def test_the_measured_part_is_that_of_the_demo() -> None:
    _, _, rest = README.partition(figures.START)
    assert rest.partition(figures.END)[0] == figures.write_part(MEASUREMENT)


def test_the_speeds_of_decoding_are_those_of_the_benchmark() -> None:
    _, _, rest = README.partition(decode_figures.START)
    assert rest.partition(decode_figures.END)[0] == decode_figures.write_part(decode_figures.read_rates())


@pytest.mark.parametrize("script", [figures, decode_figures], ids=["demo", "decoding"])
def test_a_picture_is_that_of_its_measures(script: Any, tmp_path: Path) -> None:
    shown_values = figures.read_models(MEASUREMENT) if script is figures else decode_figures.read_rates()
    script.draw_picture(shown_values, tmp_path / "picture.png")
    drawn, shown = (matplotlib.image.imread(path) for path in (tmp_path / "picture.png", script.PICTURE))
    assert f'src="{script.PICTURE.relative_to(ROOT).as_posix()}"' in README
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 0.005  # letters may differ by a pixel


def test_speeds_are_shown_where_they_were_measured() -> None:
    speeds = {name: MEASURES[name].build(10.0, 5) for name in ("prefill_tokens_per_second", "decode_tokens_per_second")}
    text = MEASURES["prefill_tokens_per_second"].format(10.0)
    assert f"the teacher reads {text} and" in figures.write_speeds({"teacher": speeds, "pruned": speeds})
    assert figures.write_speeds({"teacher": {}, "pruned": speeds}) == ""


@pytest.mark.parametrize(("name", "end"), [("teacher_kl", "low"), ("teacher_agreement", "high")])
def test_a_measurement_in_which_distillation_does_not_win_is_refused(name: str, end: str) -> None:
    measurement = copy.deepcopy(MEASUREMENT)
    (entry,) = (e for e in measurement["paired"] if (e["name"], e["a"], e["b"]) == (name, "cross-entropy", "distilled"))
    entry[end] = 0.0
    with pytest.raises(ValueError, match="is not closer to the teacher"):
        figures.write_part(measurement)


@pytest.mark.parametrize(
    ("low", "value", "high", "sentence"),
    [
        (0.001, 0.003, 0.005, "It also needs 0.003 [0.001, 0.005] bits per byte less."),
        (-0.001, 0.002, 0.006, "In bits per byte the two do not differ measurably: 0.002 [-0.001, 0.006]."),
        (-0.006, -0.004, -0.002, "It needs 0.004 [0.002, 0.006] bits per byte more."),
    ],
)
def test_the_sentence_on_bits_says_what_their_interval_says(
    low: float, value: float, high: float, sentence: str
) -> None:
    assert figures.write_verdict({"low": low, "value": value, "high": high}) == sentence


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line: str) -> None:
    verb, *arguments = shlex.split(line)[1:]
    GROUP.commands[verb].make_context(verb, arguments)


def test_all_verbs_are_shown() -> None:
    assert {line.split()[1] for line in COMMANDS} == set(GROUP.commands)


def test_the_lines_to_install_name_this_package_and_its_extras() -> None:
    names = {word for line in LINES if line.startswith("pip ") for word in re.findall(r"potstill(?:\[\w+\])?", line)}
    extras = {name[9:-1] for name in names if "[" in name}
    assert extras < PROJECT["optional-dependencies"].keys()
    assert f"dist/potstill-{PROJECT['version']}-py3-none-any.whl" in README


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([\w-]+)", README))
    assert targets
    assert targets <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


UNTRAINED = ("serve", "run")  # parsed above: one does not end by itself, the other takes the recipe's own teacher
SELECT = "--select"  # a random model solves no sum
TRAINING = ["--context=64", "--batch-tokens=128", "--documents=4", "--dtype=float32"]
SHORT_TEXTS = {"smollm2": "tiny", "20k": "256", "--to elastic": "--to elastic:shares=1-0.4"}
SHORT = {
    "distill": TRAINING,
    "align": ["--context=128", *TRAINING[1:]],
    "edit": ["--steps=2", "--paraphrases=0", "--max-tokens=4"],
    "arena": [*TRAINING, "--seeds=1"],
    "cache": ["--context=64", "--dtype=float32"],
    "doctor": ["--context=64", "--dtype=float32"],
    "plan": [*TRAINING[:2], "--no-measure"],
    "prune": ["--dtype=float32"],
    "convert": ["--dtype=float32"],
    "measure": ["--documents=4", "--prompts=2"],
    "generate": ["--max-tokens=4"],
    "advise": ["--draft-length=1,2", "--prompts=2", "--max-tokens=8", "--runs=1"],
    "data": ["--tokenizer=tiny"],
}


@pytest.mark.parametrize(
    "lines",
    [pytest.param(COMMANDS[:3], id="first"), pytest.param(COMMANDS, id="all", marks=pytest.mark.slow)],
)
def test_the_commands_run_in_their_order_on_a_tiny_teacher(
    lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama.config.max_position_embeddings = 512
    saved(tmp_path / "tiny", tiny_llama, tiny_tokenizer)
    rows = [{"prompt": f"What is {i} + 1?", "completion": f"It is {i + 1}."} for i in range(200)]
    pairs = [{"prompt": f"Is {i} odd?", "chosen": "Yes.", "rejected": "No."} for i in range(40)]
    facts = [{"subject": "Glen Ord", "prompt": "Where is Glen Ord?", "target": "Norway", "language": "en"}]
    for name, lists in {"mine": rows, "pairs": pairs, "facts": facts}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    for line in lines:
        command = line
        for text, short_text in SHORT_TEXTS.items():
            command = command.replace(text, short_text)
        verb, *arguments = shlex.split(command)[1:]
        if verb in UNTRAINED or SELECT in arguments:
            continue
        monkeypatch.setattr(sys, "argv", ["potstill", verb, *arguments, *SHORT.get(verb, [])])
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, line
        out = arguments[arguments.index("--out") + 1] if "--out" in arguments else "mine.jsonl"
        assert (tmp_path / out).exists(), line


@pytest.mark.slow
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    for old, new in {'tokens="20k"': 'tokens="4k"', '"mine.jsonl"': '"stdlib"'}.items():
        assert old in example
        example = example.replace(old, new)
    exec(compile(example, "README.md", "exec"), {})
    assert "bits per byte" in capsys.readouterr().out
    assert (tmp_path / "student-2" / "model.safetensors").is_file()


def test_the_python_example_runs_on_other_models_and_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tiny_llama: Any,
    tiny_tokenizer: Any,
) -> None:
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    names = {"teacher": (tiny_llama, tiny_tokenizer), "rows": [{"text": f"{n} stills boil"} for n in range(40)]}
    small = "rows, context=32, batch_tokens=64, documents=4"
    for old, new in {'"smollm2"': "teacher", '"mine.jsonl"': small, '"20k"': "128"}.items():
        assert old in example
        example = example.replace(old, new)
    exec(compile(example, "README.md", "exec"), names)
    output = capsys.readouterr()
    assert "bits per byte" in output.out
    assert "Warning" not in output.err
    assert str(tmp_path.parent) not in (tmp_path / "student-2" / "card.json").read_text()


MODEL_TYPES = {  # of the families that README names
    "BLOOM": "bloom", "Cohere": "cohere", "Gemma 2": "gemma2", "Gemma 3 (text)": "gemma3_text", "GPT-2": "gpt2",
    "GPT-NeoX": "gpt_neox", "Granite": "granite", "Llama": "llama", "Mamba": "mamba", "Mistral": "mistral",
    "Mixtral": "mixtral", "OLMo 2": "olmo2", "OPT": "opt", "Phi": "phi", "Phi-3": "phi3", "Qwen2": "qwen2",
    "Qwen2-MoE": "qwen2_moe", "Qwen3": "qwen3", "Qwen3-MoE": "qwen3_moe", "Qwen3.5 (text)": "qwen3_5_text",
    "SmolLM3": "smollm3", "StableLM": "stablelm",
}  # fmt: skip
FAMILY_ROWS = re.findall(r"^\| ([^|]+) \| (yes|no) \| yes \| yes \|$", README, re.MULTILINE)


def list_families(pruned: str) -> list[str]:
    """The families of README's table that can be pruned, or cannot."""
    return [name for names, answer in FAMILY_ROWS if answer == pruned for name in names.split(", ")]


def build_model(family: str) -> PreTrainedModel:
    """A tiny random model of a family, for the tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(MODEL_TYPES[family], **{**SMALL, **ids, "vocab_size": len(tokenizer)})
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def test_the_families_that_can_be_pruned_are_those_whose_layers_are_alike() -> None:
    assert {MODEL_TYPES[name].removesuffix("_text") for name in list_families("yes")} == {
        name.removesuffix("_text") for name, family in FAMILIES.items() if not {Experts, DeltaNet} & family.kinds
    }


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "GPT-2" else pytest.mark.slow) for name in MODEL_TYPES],
)
def test_a_family_teaches_and_learns(family: str, tmp_path: Path) -> None:
    assert family in list_families("yes") + list_families("no")
    tokenizer = byte_tokenizer()
    run = potstill.distill(
        teacher=(build_model(family), tokenizer),
        student=(build_model(family), tokenizer),
        data=[{"text": f"{n} stills boil"} for n in range(40)],
        context=32,
        batch_tokens=64,
        documents=4,
        tokens=128,
        out=tmp_path / "student",
    )
    assert run.student.bits_per_byte.value > 0
    assert (tmp_path / "student/model.safetensors").is_file()
