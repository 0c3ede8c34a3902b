"""LoRA adapter folders: opened on their base and merged, or refused in one sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.models.folders import POINTER, compute_logits, edit_json, save_folder
from tests.tiny import byte_tokenizer

from potstill.core.errors import ArtifactError, NotFound, PotstillError, UnsafeModel, UnsupportedModel
from potstill.models.load import load_model
from potstill.models.spec import read_model_spec
from potstill.models.weight_files import count_bytes_on_disk


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The folder of an adapter, beside that of its base, and the logits of both together."""
    folder = tmp_path_factory.mktemp("lora")
    save_folder(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_model(folder / "base").model, config)
    model.save_pretrained(folder / "adapter")
    edit_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path="../base")
    return folder / "adapter", compute_logits(model.eval())


@pytest.fixture
def copy(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    """The adapter and its base once more, to be changed."""
    return shutil.copytree(adapter[0].parent, tmp_path / "copy") / "adapter"


def test_an_adapter_is_merged_into_its_base(adapter: tuple[Path, torch.Tensor]) -> None:
    folder, logits = adapter
    loaded, base = load_model(folder), load_model(folder.parent / "base")
    found = compute_logits(loaded.model)
    assert (found - logits).abs().max() < 1e-4
    assert (found - compute_logits(base.model)).abs().max() > 0.1
    assert type(loaded.model) is type(base.model)
    assert loaded.model.state_dict().keys() == base.model.state_dict().keys()
    assert (loaded.license, loaded.name) == ("mit", str(folder))
    assert "adapter merged into" in loaded.note
    assert loaded.tokenizer("hé").input_ids == base.tokenizer("hé").input_ids
    assert count_bytes_on_disk(loaded.path) == count_bytes_on_disk(base.path)
    assert read_model_spec(folder).blueprint == read_model_spec(folder.parent / "base").blueprint


def change_scale(folder: Path) -> None:
    edit_json(folder / "adapter_config.json", lora_alpha=16)


def change_adapter(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, folder / "adapter_model.safetensors")


def change_base(folder: Path) -> None:
    weights = load_file(folder.parent / "base" / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder.parent / "base" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [change_scale, change_adapter, change_base])
def test_the_digest_of_an_adapter_covers_adapter_and_base(change: Callable[[Path], None], copy: Path) -> None:
    before = load_model(copy).digest
    assert load_model(copy).digest == before
    change(copy)
    assert load_model(copy).digest != before


def test_adapter_files_in_a_whole_folder_are_not_attached(
    adapter: tuple[Path, torch.Tensor], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_model(copy.parent / "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(copy / name, copy.parent / "base")
    loaded = load_model(copy.parent / "base")
    assert torch.equal(compute_logits(loaded.model), compute_logits(base.model))
    assert loaded.digest == base.digest
    assert "not attached" in loaded.note
    assert "holds a whole model and adapter files, which are not attached" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_with_added_tokens_brings_its_rows_and_its_tokenizer(copy: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<word>"])
    tokenizer.save_pretrained(copy)
    base = load_model(copy.parent / "base").model
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.save_pretrained(copy)
    edit_json(copy / "adapter_config.json", base_model_name_or_path="../base")
    loaded = load_model(copy)
    assert loaded.vocabulary == len(loaded.tokenizer) == len(tokenizer) == 260
    assert (compute_logits(loaded.model) - compute_logits(model.eval())).abs().max() < 1e-4


def no_base(folder: Path) -> None:
    shutil.rmtree(folder.parent / "base")


def unnamed_base(folder: Path) -> None:
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)


def hub_base(folder: Path) -> None:
    edit_json(folder / "adapter_config.json", base_model_name_or_path="no-one/no-such-base")


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def pointer(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(POINTER)


def fewer_weights(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if ".2." not in name}, folder / "adapter_model.safetensors"
    )


def other_base(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    more = {name.replace(".2.", ".7."): weight.clone() for name, weight in weights.items() if ".2." in name}
    save_file(weights | more, folder / "adapter_model.safetensors")


def wider_base(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    wider = {name: weight.repeat(1, 2) if "lora_A" in name else weight for name, weight in weights.items()}
    save_file(wider, folder / "adapter_model.safetensors")


def classifier(folder: Path) -> None:
    edit_json(folder / "adapter_config.json", task_type="SEQ_CLS")


def prefix(folder: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_model(folder.parent / "base").model, config).save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="../base")


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (no_base, NotFound, "is an adapter, and its base ../base cannot be opened"),
        (unnamed_base, ArtifactError, "names no base model; set base_model_name_or_path"),
        (hub_base, NotFound, "its base no-one/no-such-base cannot be opened"),
        (no_weights, ArtifactError, "no adapter_model.safetensors"),
        (pickled_weights, UnsafeModel, "--allow-pickle"),
        (pointer, ArtifactError, "git lfs pull"),
        (fewer_weights, ArtifactError, "lacks weights of its adapter"),
        (other_base, ArtifactError, "14 weights that its base has no place for"),
        (wider_base, ArtifactError, "does not fit its base"),
        (classifier, UnsupportedModel, "LORA/SEQ_CLS, which cannot be merged"),
        (prefix, UnsupportedModel, "PREFIX_TUNING/CAUSAL_LM, which cannot be merged"),
    ],
)
def test_a_spoilt_adapter_is_refused_in_one_sentence(
    spoil: Callable[[Path], None], error: type[PotstillError], says: str, copy: Path
) -> None:
    spoil(copy)
    with pytest.raises(error, match=says) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Model", "ignore:Setting", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_of_a_tied_head_is_refused_where_merging_would_change_the_embedding(tmp_path: Path) -> None:
    save_folder(tmp_path / "base", tied=True)
    config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load_model(tmp_path / "base").model, config).save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(UnsupportedModel, match="without changing what it computes"):
        load_model(tmp_path / "adapter")


def test_pickled_adapters_open_when_asked_for(adapter: tuple[Path, torch.Tensor], copy: Path) -> None:
    pickled_weights(copy)
    assert (compute_logits(load_model(copy, allow_pickle=True).model) - adapter[1]).abs().max() < 1e-4
