"""Model folders whose config contradicts their weights, whose tokenizer exceeds them, or that are quantized."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.folders import POINTER, compute_logits, edit_json, save_folder
from tests.tiny import byte_tokenizer, random_llama

from potstill.core.errors import ArtifactError, MissingDependency, UnsupportedModel, VocabularyMismatch
from potstill.models.families.registry import import_model
from potstill.models.load import load_model
from potstill.models.quantization import check_trainable, read_quantization
from potstill.models.saving import save_model_folder
from potstill.models.tokenizers.token_bytes import read_token_bytes

LAYER = "model.layers.2."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole folder, its head not tied."""
    return save_folder(tmp_path / "model")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the weights of a folder."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def tied_config(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)


def test_a_config_that_ties_a_head_of_its_own_is_corrected(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = compute_logits(load_model(folder).model)
    tied_config(folder)
    loaded = load_model(folder)
    assert torch.equal(compute_logits(loaded.model), expected)
    assert loaded.model.config.tie_word_embeddings is False
    assert "not tied" in loaded.note
    assert "ties head and embedding, and the weights differ" in capsys.readouterr().err
    assert not import_model(loaded.model).blueprint.tied
    save_model_folder(loaded.model, loaded.tokenizer, tmp_path / "saved")
    assert torch.equal(compute_logits(load_model(tmp_path / "saved").model), expected)
    assert load_model(tmp_path / "saved").note == ""


def test_a_tied_config_with_an_equal_head_stays_tied(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model", tied=True)
    edit_weights(folder, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    loaded = load_model(folder)
    assert loaded.model.config.tie_word_embeddings is True
    assert loaded.note == ""
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight


def no_head(folder: Path) -> None:
    edit_weights(folder, lambda w: {name: weight for name, weight in w.items() if "lm_head" not in name})


def surplus_layer(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=2)


def missing_layer(folder: Path) -> None:
    edit_weights(folder, lambda w: {name: weight for name, weight in w.items() if not name.startswith(LAYER)})


def missing_norm(folder: Path) -> None:
    edit_weights(folder, lambda w: {name: weight for name, weight in w.items() if name != "model.norm.weight"})


def part_of_a_layer(folder: Path) -> None:
    edit_weights(folder, lambda w: {name: weight for name, weight in w.items() if name != f"{LAYER}mlp.up_proj.weight"})


def pointer_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)


def pointer_for_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(POINTER)


def pointer_for_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(POINTER)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_head, r'holds no lm_head.weight, .*set "tie_word_embeddings": true there'),
        (surplus_layer, r"says 2 layers \(num_hidden_layers\), and the weights hold 3;"),
        (missing_layer, r"says 3 layers \(num_hidden_layers\), and the weights hold 2;"),
        (missing_norm, r"lacks 1 weights, such as model.norm.weight"),
        (part_of_a_layer, r"lacks 1 weights, such as model.layers.2.mlp.up_proj.weight"),
        (pointer_for_weights, r"model.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull` in"),
        (pointer_for_config, r"config.json is a Git LFS pointer"),
        (pointer_for_tokenizer, r"tokenizer.json is a Git LFS pointer"),
    ],
)
def test_a_folder_that_is_not_what_its_config_says_is_refused_in_one_sentence(
    spoil: Callable[[Path], None], says: str, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(ArtifactError, match=says) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_pointer_for_weights_that_are_not_read_does_no_harm(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(POINTER)
    assert load_model(folder).digest


# tokenizers with more ids than rows


@pytest.fixture
def surplus(tmp_path: Path) -> Path:
    """A model of 259 rows with a tokenizer of 261 ids."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<word>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return save_folder(tmp_path / "surplus", tokenizer=tokenizer)


def test_ids_without_a_row_are_cut_and_refused_in_a_text(surplus: Path) -> None:
    loaded = load_model(surplus)
    assert (len(loaded.tokenizer), loaded.vocabulary) == (261, 259)
    ids = loaded.tokenizer("no such word", return_tensors="pt").input_ids
    assert loaded.model(input_ids=ids).logits.isfinite().all()
    ids = loaded.tokenizer("a <word>", return_tensors="pt").input_ids
    with pytest.raises(VocabularyMismatch, match=r"'<word>' \(id 259\).*261 ids exceed the 259 rows") as caught:
        loaded.model(input_ids=ids)
    assert "\n" not in str(caught.value)
    with pytest.raises(VocabularyMismatch, match="261 ids exceed the 259 rows"):
        loaded.model.generate(input_ids=ids, max_new_tokens=2)


def test_a_model_with_a_row_for_each_id_has_no_guard(folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.vocabulary == len(loaded.tokenizer) == 259
    assert not loaded.model.get_input_embeddings()._forward_pre_hooks


def test_cropped_token_bytes_hold_the_ids_below() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    pieces = read_token_bytes(tokenizer)
    cropped = pieces.crop(259)
    assert cropped.by_id == pieces.by_id[:259]
    assert cropped.special_ids == pieces.special_ids - {259}
    assert pieces.crop(260) == pieces


# quantized folders


def quantize(folder: Path, **facts: object) -> Path:
    edit_json(folder / "config.json", quantization_config=facts)
    return folder


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("facts", "method", "packages"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", "optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "awq", "gptqmodel"),
        ({"load_in_4bit": True}, "bitsandbytes", "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors", "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao", "torchao"),
    ],
)
def test_a_quantized_folder_is_no_student_and_names_its_package(
    facts: dict[str, object], method: str, packages: str, folder: Path
) -> None:
    quantize(folder, **facts)
    assert read_quantization(folder) == method
    with pytest.raises(UnsupportedModel, match=rf"is quantized \({method}\), so it can only be a --teacher"):
        check_trainable(str(folder))
    packaged = {"gptq": "gptqmodel", "awq": "gptqmodel"}.get(method, method).replace("-", "_")
    try:
        __import__(packaged)
    except ImportError:
        with pytest.raises((MissingDependency, UnsupportedModel)) as caught:
            load_model(folder)
        assert f"run: pip install {packages}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_folder_of_fp8_weights_is_a_teacher_and_no_student(folder: Path) -> None:
    expected = compute_logits(load_model(folder).model)

    def to_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored = dict(weights)
        for name, weight in weights.items():
            if "_proj" in name:
                scale = weight.abs().max() / 448
                stored[name] = (weight / scale).to(torch.float8_e4m3fn)
                stored[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
        return stored

    edit_weights(folder, to_fp8)
    quantize(folder, **FP8)
    loaded = load_model(folder)
    assert (compute_logits(loaded.model) - expected).abs().max() < 0.3 * expected.abs().max()
    assert (loaded.quantization, loaded.note) == ("fp8", "fp8 weights")
    loaded.move_to(torch.device("cpu"), torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    with pytest.raises(UnsupportedModel, match=r"is quantized \(fp8\)"):
        check_trainable(str(folder))


def test_weights_of_an_unknown_quantization_are_not_taken_as_they_are(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="quantized by a method that transformers does not know"):
        load_model(quantize(folder, quant_method="something"))


def test_a_dense_model_is_trainable(folder: Path) -> None:
    check_trainable(str(folder))
    assert read_quantization(folder) == ""
    assert load_model(folder).quantization == ""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_are_a_teacher(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

    model_config = random_llama(byte_tokenizer()).config
    model_config.hidden_size, model_config.intermediate_size, model_config.head_dim = 128, 256, 32  # its blocks are 64
    folder = tmp_path / "model"
    LlamaForCausalLM(model_config).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    save_model_folder(model, byte_tokenizer(), tmp_path / "quantized")
    loaded = load_model(tmp_path / "quantized")
    assert (compute_logits(loaded.model) - compute_logits(model.eval())).abs().max() < 1e-3
    loaded.move_to(torch.device("cpu"), torch.bfloat16)
    assert compute_logits(loaded.model).isfinite().all()
    assert loaded.quantization == "bitsandbytes"
