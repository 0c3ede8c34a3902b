"""An export opens in its runtime with the model's tokens, or is refused in one sentence and leaves nothing behind."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.gguf_export.test_file import CONFIGS, build, merging_tokenizer
from tests.tiny import byte_tokenizer
from transformers import GPT2Config, PreTrainedModel

import potstill
from potstill.core.errors import (
    ArtifactError,
    MissingDependency,
    NotFound,
    OutputExists,
    PotstillError,
    UnsupportedModel,
    UsageError,
    VocabularyMismatch,
)
from potstill.core.results import Report
from potstill.layers.ffn.experts import Experts
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model, import_model
from potstill.models.load import load_model
from potstill.models.saving import save_model_folder
from potstill.stages.export import llama_cpp
from potstill.stages.export.export import ExportConfig
from potstill.stages.export.greedy_check import compare_logits
from potstill.stages.export.hf_format import make_stock_model
from potstill.stages.push import push

IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a stock folder."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    save_model_folder(build(CONFIGS["tied llama"]), merging_tokenizer(), folder)
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def outcome(result: Report, name: str) -> str:
    return next(check["outcome"] for check in result["checks"] if check["name"] == name)


def test_a_gguf_folder_holds_the_model_its_card_and_what_ollama_reads(folder: Path, tmp_path: Path) -> None:
    result = potstill.export(folder, to="gguf", type="f32", out=tmp_path / "made")
    made = tmp_path / "made"
    assert {file.name for file in made.iterdir()} == {"made-f32.gguf", "Modelfile", "README.md", "card.json"}
    assert (logits(load_model(made).model) - logits(load_model(folder).model)).abs().max() < 1e-4
    assert (made / "Modelfile").read_text().splitlines()[0] == "FROM ./made-f32.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in (made / "Modelfile").read_text()
    readme = (made / "README.md").read_text()
    assert "llama-server -m made-f32.gguf" in readme
    assert "ollama create made -f Modelfile && ollama run made" in readme
    assert str(folder.parent) not in readme
    assert result["commands"]["llama.cpp"] == f"llama-server -m {made}/made-f32.gguf"
    assert json.loads((made / "card.json").read_text())["details"]["architecture"] == "llama"


def test_without_llama_cpp_the_check_says_how_to_install_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    result = potstill.export(folder, to="gguf", out=tmp_path / "made.gguf")
    assert "pip install 'potstill[llama]'" in outcome(result, "llama.cpp")
    assert [file.name for file in tmp_path.iterdir()] == ["made.gguf"]


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
@pytest.mark.parametrize("file_type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("family", CONFIGS)
def test_llama_cpp_writes_the_tokens_of_the_file(family: str, file_type: str, tmp_path: Path) -> None:
    save_model_folder(build(CONFIGS[family]), merging_tokenizer(), tmp_path / "source")
    result = potstill.export(tmp_path / "source", to="gguf", type=file_type, out=tmp_path / "made.gguf")
    assert "greedy tokens equal" in outcome(result, "llama.cpp")
    assert outcome(result, "tokenizer in llama.cpp") == "equal ids on all probes"


class OtherRuntime:
    """A runtime that computes something else than the file says."""

    n_tokens = 0

    def __init__(self) -> None:
        self.generator = np.random.default_rng(1)

    @property
    def scores(self) -> Any:
        return self.generator.normal(size=(self.n_tokens, 260)).astype(np.float32)

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, ids: list[int]) -> None:
        self.n_tokens += len(ids)

    def tokenize(self, text: bytes, **_: Any) -> list[int]:
        ids: list[int] = merging_tokenizer()(text.decode(), add_special_tokens=False).input_ids
        return ids


@pytest.mark.parametrize("out", ["made", "made.gguf"])
def test_a_runtime_that_differs_leaves_no_file(
    out: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def open_file(*_: Any, **__: Any) -> Iterator[OtherRuntime]:
        yield OtherRuntime()

    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "open_file", open_file)
    with pytest.raises(ArtifactError, match=r"reads the file otherwise than potstill .*no tie.*nothing was kept"):
        potstill.export(folder, to="gguf", out=tmp_path / out)
    assert not list(tmp_path.iterdir())
    potstill.export(folder, to="gguf", out=tmp_path / out, check=False)
    assert [file.name for file in tmp_path.iterdir()] == [out]


def test_a_difference_is_a_tie_only_within_the_rounding_that_was_seen() -> None:
    own = np.zeros((3, 5), np.float32)
    own[:, 1] = 10
    own[2, 2] = 9.99
    runtime = own + np.float32([[0.01], [-0.01], [0.0]]) * np.float32([1, -1, 1, -1, 1])
    tie = compare_logits("x", [1, 1, 2], runtime, own, rounding=1e-2)
    assert (tie.passed, tie.first_difference) == (True, 2)
    assert tie.margin == pytest.approx(0.001, rel=1e-3)
    own[2, 2] = 9.0
    assert not compare_logits("x", [1, 1, 2], runtime, own, rounding=1e-2).passed
    equal = compare_logits("x", [1, 1], runtime[:2], own[:2], rounding=1e-2)
    assert (equal.passed, equal.first_difference) == (True, None)
    assert not compare_logits("x", [1, 1], runtime[:2], own[:2], rounding=1e-5).passed


def test_a_stock_folder_reopens_with_equal_logits_and_can_be_pushed(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    result = potstill.export(folder, to="hf", save_dtype="float32", out=made)
    assert torch.equal(logits(load_model(made).model), logits(load_model(folder).model))
    assert result["commands"]["vLLM"] == f"vllm serve {made} --served-model-name made"
    readme = (made / "README.md").read_text()
    assert "vllm serve made --served-model-name made" in readme
    assert "potstill export made --to gguf --type q8_0 --out made-gguf" in readme
    assert 'from_pretrained("made"' in readme
    assert "README.md" in push(made, "you/made", dry_run=True)["files"]


def test_a_gguf_file_becomes_a_stock_folder(folder: Path, tmp_path: Path) -> None:
    potstill.export(folder, to="gguf", type="f32", out=tmp_path / "a.gguf")
    potstill.export(tmp_path / "a.gguf", to="hf", save_dtype="float32", out=tmp_path / "back")
    assert (logits(load_model(tmp_path / "back").model) - logits(load_model(folder).model)).abs().max() < 1e-4


def test_a_gemma_that_was_pruned_in_width_becomes_a_stock_gemma() -> None:
    backbone = import_model(build(CONFIGS["gemma3_text"]))
    scaled = Backbone(replace(backbone.blueprint, embedding_scale=11.0)).eval()
    scaled.load_state_dict(backbone.state_dict())
    pruned = export_model(scaled)
    assert pruned.config.model_type == "potstill"
    stock = make_stock_model(pruned)
    assert stock.config.model_type == "gemma3_text"
    assert (logits(stock) - logits(pruned)).abs().max() < 1e-5 * logits(pruned).abs().max()


def test_straight_through_experts_become_a_stock_mixtral() -> None:
    dense = import_model(build(CONFIGS["tied llama"])).blueprint
    experts = Experts(dense.layers[0].ffn, 3, 1, "straight_through")
    own = export_model(Backbone(dense.change_layers(lambda _: True, lambda x: replace(x, ffn=experts))).eval())
    assert own.config.model_type == "potstill"
    stock = make_stock_model(own)
    assert (stock.config.model_type, stock.config.num_experts_per_tok) == ("mixtral", 1)
    assert (logits(stock) - logits(own)).abs().max() < 1e-5 * logits(own).abs().max()


def test_a_draft_is_exported_beside_the_model_and_named_in_the_commands(folder: Path, tmp_path: Path) -> None:
    draft = tmp_path / "small"
    config = CONFIGS["tied llama"].__class__(**{**CONFIGS["tied llama"].to_dict(), "num_hidden_layers": 1})
    save_model_folder(build(config), merging_tokenizer(), draft)
    made = tmp_path / "made"
    result = potstill.export(folder, to="gguf", type="q8_0", draft=draft, out=made)
    assert {file.name for file in made.glob("*.gguf")} == {"made-q8_0.gguf", "draft-q8_0.gguf"}
    assert f"-md {made}/draft-q8_0.gguf --spec-type draft-simple" in result["commands"]["llama.cpp"]
    result = potstill.export(folder, to="hf", draft=draft, out=tmp_path / "stock")
    assert f'"model": "{tmp_path}/stock/draft"' in result["commands"]["vLLM"]
    assert load_model(tmp_path / "stock" / "draft").model.config.num_hidden_layers == 1


def save_gpt2(tmp_path: Path) -> str:
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    save_model_folder(build(config), merging_tokenizer(), tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def save_other_tokenizer(tmp_path: Path) -> str:
    save_model_folder(build(CONFIGS["llama"]), byte_tokenizer(), tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "out", "error", "says"),
    [
        ({"to": "ggml"}, "made", UsageError, "--to 'ggml' is none of hf, gguf, onnx, openvino"),
        ({"to": "gguf", "type": "q9"}, "made", UsageError, "--type 'q9' is none of f32, f16, bf16, q8_0, q4_0"),
        ({"to": "hf", "save_dtype": "int8"}, "made", UsageError, "--save-dtype 'int8' is none of"),
        ({"to": "hf"}, "made.gguf", UsageError, "--to hf writes a folder, and --out .*made.gguf is one file"),
        ({"to": "gguf"}, "no/such/made.gguf", NotFound, "there is no folder .* create it first"),
        ({"to": "gguf"}, "there.gguf", OutputExists, "there.gguf exists; choose another --out, or pass --overwrite"),
        ({"to": "onnx", "draft": "x"}, "made", UsageError, "--draft is for vLLM and llama.cpp"),
        ({"to": "gguf", "draft": "x"}, "made.gguf", UsageError, "a model and its draft are two files"),
    ],
)
def test_a_wrong_call_is_refused_in_one_sentence(
    options: dict[str, Any], out: str, error: type[PotstillError], says: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    with pytest.raises(error, match=says) as caught:
        potstill.export(folder, out=tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["there.gguf"]


def test_an_architecture_that_gguf_cannot_express_is_named_with_what_it_can(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="does not know 'gpt2' models; GGUF files hold the shapes of Llama"):
        potstill.export(save_gpt2(tmp_path), to="gguf", out=tmp_path / "made.gguf")
    assert not (tmp_path / "made.gguf").exists()


def test_a_draft_with_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VocabularyMismatch, match=r"the draft .* has another tokenizer than .*; give a draft"):
        potstill.export(folder, to="hf", draft=save_other_tokenizer(tmp_path), out=tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("runtime", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_runtime_is_named_with_its_extra(
    runtime: str, package: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potstill.stages.preflight.find_spec", lambda name: None if name == package else True)
    with pytest.raises(
        MissingDependency, match=rf"{package} is not installed; run: pip install 'potstill\[{runtime}\]'"
    ):
        ExportConfig(model=str(folder), to=runtime).run(tmp_path / "made")


@pytest.mark.parametrize(("runtime", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_graph_writes_the_tokens_of_the_model(runtime: str, package: str, folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    result = potstill.export(folder, to=runtime, out=tmp_path / "made")
    assert "greedy tokens equal" in result["checks"][0]["outcome"]
