"""The verbs as Python functions: the command line's names and defaults, real signatures, and results as objects.

`python tests/surface/test_api.py` writes `src/potstill/__init__.pyi`, which shows the signatures to editors and mypy.
"""

import ast
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import typer.main
from transformers import PreTrainedModel

import potstill
from potstill import api
from potstill.cli.app import app
from potstill.cli.options import SCREEN_OPTIONS
from potstill.core.errors import UsageError
from potstill.core.measure import Measure
from potstill.core.results import MeasureTable, Report
from potstill.data.corpus import load_corpus
from potstill.models.load import LoadedModel, load_model
from potstill.objectives.user_file import ObjectiveSource
from potstill.stages.caller_objects import DataSource, ModelSource, name_objects
from potstill.stages.distill.config import DistillConfig

GROUP: Any = typer.main.get_command(app)
STUB = Path(potstill.__file__).with_name("__init__.pyi")
VERBS = (
    *(
        "distill",
        "align",
        "prune",
        "convert",
        "measure",
        "frontier",
        "generate",
        "plan",
        "doctor",
        "arena",
        "cache",
        "load",
        "data",
    ),
    *("export", "advise", "edit", "run"),
)
ALIASES = {  # the longer union first, since it contains the others
    inspect.formatannotation(ModelSource): "ModelSource",
    inspect.formatannotation(DataSource): "DataSource",
    inspect.formatannotation(ObjectiveSource): "ObjectiveSource",
}
HEADER = '''"""The Python API with its signatures; `python tests/surface/test_api.py` writes this file."""

from collections.abc import Callable, Sequence
from pathlib import Path

from potstill.core.results import MeasureTable, Report
from potstill.models.hf_causal_lm import AutoModelForCausalLM as AutoModelForCausalLM
from potstill.models.load import LoadedModel
from potstill.objectives.user_file import ObjectiveSource
from potstill.stages.caller_objects import DataSource, ModelSource
from potstill.stages.training import TrainingResult

__version__: str
'''


def spell(annotation: Any) -> str:
    text = inspect.formatannotation(annotation)
    for long, alias in ALIASES.items():
        text = text.replace(long, alias)
    for module in ("collections.abc.", "pathlib.", "potstill.core.results.", "potstill.models.load."):
        text = text.replace(module, "")
    return text.replace("potstill.stages.training.", "")


NOT_SHARED = {"help", *SCREEN_OPTIONS}  # what a screen shows is no option of a job


def spell_default(value: Any) -> str:
    return "..." if isinstance(value, dict) else repr(value).replace("'", '"')


def make_stub() -> str:
    parts = [HEADER]
    for verb in VERBS:
        function = getattr(api, verb)
        signature, lines, is_keyword = inspect.signature(function), [], False
        for p in signature.parameters.values():
            star = "*" if p.kind is p.VAR_POSITIONAL else ""
            if p.kind is p.KEYWORD_ONLY and not is_keyword:
                lines += [] if any(q.kind is q.VAR_POSITIONAL for q in signature.parameters.values()) else ["    *,"]
                is_keyword = True
            default = "" if p.default is p.empty else f" = {spell_default(p.default)}"
            lines.append(f"    {star}{p.name}: {spell(p.annotation)}{default},")
        doc = inspect.getdoc(function) or ""
        text = "\n".join(f"    {line}".rstrip() for line in doc.splitlines())
        end = '"""' if "\n" not in doc else '\n    """'
        parts.append(
            f"def {verb}(\n"
            + "\n".join(lines)
            + f'\n) -> {spell(signature.return_annotation)}:\n    """{text.strip()}{end}\n'
        )
    return "\n".join(parts)


def test_dir_shows_every_verb_and_each_has_an_explicit_signature() -> None:
    assert {*VERBS} <= set(dir(potstill))
    for verb in VERBS:
        kinds = [p.kind for p in inspect.signature(getattr(potstill, verb)).parameters.values()]
        assert inspect.Parameter.VAR_KEYWORD not in kinds
        assert inspect.getdoc(getattr(api, verb))


def test_the_stub_has_the_signatures_that_the_functions_have() -> None:
    is_current = ast.dump(ast.parse(STUB.read_text(encoding="utf-8"))) == ast.dump(ast.parse(make_stub()))
    assert is_current, "options changed: run PYTHONPATH=src:. python tests/surface/test_api.py && ruff format"


@pytest.mark.parametrize(
    ("verb", "only_on_the_command_line", "only_in_python"),
    [
        ("distill", {"config", "dry_run", "as_json"}, set()),
        ("align", {"config", "dry_run", "as_json"}, set()),
        ("prune", {"config", "dry_run", "as_json", "layers", "kv_heads", "ffn", "hidden"}, {"shape"}),
        ("measure", {"config", "dry_run", "as_json"}, set()),
        ("doctor", {"config", "as_json"}, set()),
        ("advise", {"config", "dry_run", "as_json"}, set()),
        ("run", {"config", "dry_run", "as_json"}, set()),
    ],
)
def test_what_python_and_the_command_line_share_is_named_and_set_alike(
    verb: str, only_on_the_command_line: set[str], only_in_python: set[str]
) -> None:
    shown = {option.name: option.default for option in GROUP.commands[verb].params if option.name not in NOT_SHARED}
    ours = inspect.signature(getattr(potstill, verb)).parameters
    assert set(shown) - set(ours) <= only_on_the_command_line | {"names"}
    hidden = {"clip", "final_rate", "calibration_tokens", "models"}
    assert set(ours) - set(shown) <= only_in_python | hidden
    shared = {name for name in set(ours) & set(shown) if ours[name].default is not inspect.Parameter.empty}
    written_otherwise = {"tokens", "report_to", "tasks", "data", "draft", "tree"}
    assert {name: ours[name].default for name in shared - written_otherwise} == {
        name: shown[name] for name in shared - written_otherwise
    }


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[DistillConfig]:
    stages: list[DistillConfig] = []

    def keep(stage: DistillConfig, out: Path, **_: Any) -> None:
        stages.append(stage)
        raise InterruptedError

    monkeypatch.setattr("potstill.api.run_distill", keep)
    return stages


def test_keywords_become_the_stage(stages: list[DistillConfig], tmp_path: Path) -> None:
    def own_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """KL(p || q) in nats for each row."""
        return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)

    call: Any = potstill.distill
    with pytest.raises(InterruptedError):
        call(
            teacher=Path("t"),
            keep=0.5,
            learning_rate=1e-4,
            max_seq_length=64,
            tokens="2k",
            seed=7,
            lora=4,
            clip=2.0,
            objective=own_kl,
            out=tmp_path,
        )
    (stage,) = stages
    assert (stage.teacher, stage.keep, stage.lora) == ("t", 0.5, 4)
    settings = stage.settings
    assert (settings.learning_rate, settings.context, settings.seed, settings.tokens) == (1e-4, 64, 7, 2000)
    assert settings.clip == 2.0
    assert stage.objective.name in ("tests/surface/test_api.py:own_kl", "test_api.py:own_kl")
    assert len(str(stage.objective.options["sha256"])) == 64
    assert stage.objective.build(None).weights.keys() == {"cross_entropy", "own_kl"}


def test_a_string_is_one_value_of_an_option_that_takes_several(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--report-to 'no_tracker' is none of"):
        potstill.distill(teacher="t", keep=0.5, report_to="no_tracker", out=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning": 1}, r"no option 'learning'.*; it has .*batch_tokens.*lora.*lr"),
        ({"temprature": 2.0}, "did you mean 'temperature'"),
        ({"per_device_train_batch_size": 4}, "potstill counts tokens: give micro_tokens"),
        ({"lr": 1e-3, "learning_rate": 1e-3}, "got lr twice"),
        ({"tokens": "many"}, "'many' is not a count"),
        ({"tokens": "2k", "num_train_epochs": 3}, "tokens and epochs both say how long to train"),
        ({"objective": lambda a, b: a}, "a function defined with def"),
        ({"data": 5}, "data cannot be a int"),
        ({"data": [{"text": "a"}, "b"]}, "row 2 of the data is a str"),
        ({"teacher": object()}, "a model cannot be a object"),
    ],
)
def test_a_wrong_keyword_is_answered_in_one_sentence(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    call: Any = potstill.distill
    with pytest.raises(UsageError, match=message):
        call(**{"teacher": "t", "keep": 0.5, "out": tmp_path, **options})


def test_objects_in_memory_are_read_by_their_names(tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    rows = [{"text": f"row {n} of a text"} for n in range(30)]
    given = {"data": datasets.Dataset.from_list(rows), "eval_data": iter(rows), "teacher": (tiny_llama, tiny_tokenizer)}
    with name_objects(given, models=["teacher"], data=["data", "eval_data"]) as named:
        assert all(name.startswith("memory:") for name in named.values())
        for name in ("data", "eval_data"):
            assert sorted(load_corpus(named[name], split="all").documents["text"]) == sorted(r["text"] for r in rows)
        loaded = load_model(named["teacher"])
        weights = loaded.model.state_dict()
        assert all(torch.equal(values, weights[name]) for name, values in tiny_llama.state_dict().items())
    assert isinstance(loaded, LoadedModel)
    with pytest.raises(Exception, match="memory:"):
        load_model(named["teacher"])


def test_data_is_a_package_and_a_function(tmp_path: Path, tiny_llama: PreTrainedModel, tiny_tokenizer: Any) -> None:
    for part in (tiny_llama, tiny_tokenizer):
        part.save_pretrained(tmp_path)
    assert importlib.import_module("potstill.data") is potstill.data
    data: Any = potstill.data
    report = data([{"prompt": f"{n}?", "response": "yes"} for n in range(30)], tokenizer=tmp_path, context=64)
    assert (report.kind, report["kind"], report.packs.length) == ("pairs", "pairs", 64)
    assert "<td>pairs</td>" in report._repr_html_()
    with pytest.raises(AttributeError, match="no entry 'size'; there is name, kind"):
        _ = report.size


def test_measures_are_attributes_and_print_as_a_table() -> None:
    measure = Measure("bits_per_byte", 1.25, "bits/byte", 10, low=1.2, high=1.3)
    table = MeasureTable({"a<b": [measure], "teacher": [measure.to_dict()]})
    assert table["teacher"].bits_per_byte.value == 1.25
    assert (list(table["a<b"]), len(table["a<b"])) == ([measure], 1)
    assert repr(table).splitlines()[1].split() == ["a<b", "1.250", "[1.200,", "1.300]"]
    assert "<td>a&lt;b</td><td>1.250 [1.200, 1.300]</td>" in table._repr_html_()
    assert "bits_per_byte" in dir(table["teacher"])
    with pytest.raises(AttributeError, match="'rouge_l' was not measured; there is bits_per_byte"):
        _ = table["teacher"].rouge_l
    assert json.loads(json.dumps(Report({"a": {"b": 1}}).to_dict())) == {"a": {"b": 1}}


if __name__ == "__main__":
    STUB.write_text(make_stub(), encoding="utf-8")
