"""A model by name: what is opened, what is refused, what is found out about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import ArtifactError, NotFound, PotstillError, UnsafeModel, UnsupportedModel
from potstill.models.available import list_available_models
from potstill.models.lineage import read_license
from potstill.models.load import compute_digest, load_model
from potstill.models.locate import locate_model


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A whole model folder."""
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The same in several files."""
    tiny_llama.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_gives_its_model_in_eval_mode_with_its_tokenizer(
    folder: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = load_model(folder)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded.model(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)
    assert not loaded.model.training
    assert loaded.tokenizer("still").input_ids == tiny_tokenizer("still").input_ids
    assert (loaded.name, loaded.path, loaded.license) == (str(folder), folder, None)


def test_shards_are_one_model(sharded: Path, tiny_llama: LlamaForCausalLM) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    found = load_model(sharded).model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in tiny_llama.state_dict().items())


def test_the_digest_is_the_same_for_a_copy_and_another_after_one_byte(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert compute_digest(copy) == compute_digest(folder)
    (copy / "README.md").write_text("only weights count")
    assert compute_digest(copy) == compute_digest(folder)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert compute_digest(copy) != compute_digest(folder)
    assert len(compute_digest(folder)) == 64


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", "apache-2.0"),
        ("---\ntags: [a]\nlicense: 'mit'\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- cc-by-4.0\n---\n", "mit, cc-by-4.0"),
        ("---\ntags: [a]\n---\nlicense: written below", None),
        ("# A model\nlicense: in the text", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_stands_in_the_front_matter_of_the_readme(readme: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert read_license(tmp_path) == licence


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def list_for_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html> 404")


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def own_code(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})


def own_tokenizer_code(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Tok", None]})


def unknown_family(folder: Path) -> None:
    edit(folder / "config.json", model_type="no-such-family", architectures=["NoSuch"])


def another_width(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=64)


def more_layers(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=5)


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def cut_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (remove_config, NotFound, "no config.json"),
        (cut_config, ArtifactError, "config.json cannot be read"),
        (list_for_config, ArtifactError, "has a list"),
        (no_weights, ArtifactError, "no weights"),
        (cut_weights, ArtifactError, "corrupt or half-written"),
        (garbage_weights, ArtifactError, "corrupt or half-written"),
        (empty_weights, ArtifactError, "corrupt or half-written"),
        (pickled_weights, UnsafeModel, "--allow-pickle"),
        (own_code, UnsafeModel, "--trust-remote-code"),
        (own_tokenizer_code, UnsafeModel, "--trust-remote-code"),
        (unknown_family, UnsupportedModel, "no-such-family"),
        (another_width, UnsupportedModel, "cannot open"),
        (more_layers, ArtifactError, "says 5 layers .* hold 3"),
        (no_tokenizer, ArtifactError, "tokenizer"),
        (cut_tokenizer, ArtifactError, "tokenizer"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_sentence(
    spoil: Callable[[Path], None], error: type[PotstillError], says: str, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(error, match=says) as caught:
        load_model(folder)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_pickled_weights_open_when_asked_for(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), folder / "pytorch_model.bin")
    found = load_model(folder, allow_pickle=True).model.state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in tiny_llama.state_dict().items())


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (None, "lacks"),
        ('{"weight_map": {}}', "lists no weights"),
        ('{"weight_map": []}', "lists no weights"),
        ('{"wei', "cannot be read"),
    ],
)
def test_a_missing_shard_or_a_broken_index_is_refused(index: str | None, says: str, sharded: Path) -> None:
    if index is None:
        sorted(sharded.glob("*.safetensors"))[1].unlink()
    else:
        (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtifactError, match=says):
        load_model(sharded)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such/folder", "no folder"),
        ("nowhere.gguf", "no file"),
        ("some-one/no-such-model", "no hub model"),
        ("no-such-model", "no hub model"),
        ("two words", "no folder"),
        ("~nobody-of-this-name/model", "cannot be a path"),
        ("x" * 5000, "cannot be a path"),
        ("null\0byte", "no"),
        ("", "config.json"),
    ],
)
def test_a_name_that_is_nothing_is_not_found(name: str, says: str) -> None:
    with pytest.raises(NotFound, match=says):
        load_model(name)


def test_a_file_that_is_no_model_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(NotFound, match="is no model"):
        locate_model(tmp_path / "notes.txt")


def test_code_and_pickled_weights_are_fetched_only_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(set(allow_patterns))
        return "somewhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    locate_model("a/b")
    locate_model("a/b", allow_pickle=True)
    locate_model("a/b", trust_remote_code=True)
    safe, pickled, code = asked
    assert "*.safetensors" in safe
    assert not {"*.bin", "*.pt", "*.pth", "*.py"} & safe
    assert pickled - safe == {"*.bin", "*.pt", "*.pth"}
    assert code - safe == {"*.py"}


def test_what_is_available_is_listed_without_a_network() -> None:
    found = list_available_models()
    assert found[0]["name"] == "smollm2"
    assert found[0]["licence"] == read_license(Path(found[0]["path"]))
    assert all({"name", "bytes", "licence", "path"} == set(model) for model in found)
