"""The pass in C gives the numbers of the model, and the same bits for a token whatever is read beside it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decode.families import ATTENTION, make_model, make_stock_model
from tests.decode.test_runner import random_ids, whole_text_logits
from tests.transforms.small import packed
from transformers import PreTrainedModel

from potstill.core.errors import UsageError
from potstill.decode.native import library
from potstill.decode.native.network import quantize_rows
from potstill.decode.native.reader import NativeReader
from potstill.decode.runner import ModelRunner
from potstill.decode.slot_reader import SlotReader
from potstill.models.elastic import copy_size, get_sizes, slice_model
from potstill.models.families.registry import export_model, import_model
from potstill.transforms.convert.registry import parse_conversion

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "potstill")

pytestmark = pytest.mark.skipif(library.load_library() is None, reason="there is no C compiler")


def make_runner(model: PreTrainedModel, **options: Any) -> ModelRunner:
    runner = ModelRunner(model, vocabulary=97, slots=3, **options)
    assert isinstance(runner.reader, NativeReader)
    return runner


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_of_ragged_texts_have_the_logits_of_their_paths(family: str) -> None:
    model = make_model(family).float()
    runner = make_runner(model)
    texts = [random_ids(length, length) for length in (13, 5, 9)]
    for slot, ids in enumerate(texts):
        output = runner.prefill(slot, ids)
        torch.testing.assert_close(output.logits, whole_text_logits(model, ids), rtol=1e-3, atol=1e-3)
    tokens, parents = torch.tensor([random_ids(5, n) for n in range(3)]), torch.tensor([[-1, 0, 0, 2, 1]] * 3)
    logits = runner.forward([0, 1, 2], tokens, parents).logits
    for row in range(3):
        for path in ([0], [0, 1], [0, 2], [0, 2, 3], [0, 1, 4]):
            expected = whole_text_logits(model, texts[row] + tokens[row, path].tolist())
            torch.testing.assert_close(logits[row, path[-1]], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_has_the_same_bits_alone_in_a_batch_and_in_a_draft(family: str, dtype: torch.dtype) -> None:
    model = make_model(family).to(dtype)
    texts = [random_ids(length, length) for length in (13, 5, 9)]
    tokens = torch.tensor([random_ids(7, n) for n in range(3)])
    alone = []
    for slot, ids in enumerate(texts):
        runner = make_runner(model)
        runner.prefill(0, ids)
        for token in tokens[slot].tolist():
            alone.append(runner.forward([0], torch.tensor([[token]])).logits[0, 0])
            runner.commit(0, [0])
    runner = make_runner(model)
    for slot, ids in enumerate(texts):
        runner.prefill(slot, ids)
    together = runner.forward([0, 1, 2], tokens).logits.flatten(0, 1)
    assert torch.equal(together, torch.stack(alone))
    branches = torch.cat([tokens[:, :1], tokens[:, :1], tokens[:, 1:3]], 1)  # a false start beside the true path
    tree = runner.forward([0, 1, 2], branches, torch.tensor([[-1, -1, 1, 2]] * 3)).logits
    assert torch.equal(tree[:, 1:].flatten(0, 1), torch.stack(alone).view(3, 7, -1)[:, :3].flatten(0, 1))


def test_the_number_of_threads_changes_no_bit() -> None:
    model, ids, logits = make_model("gemma3_text").float(), random_ids(21, 5), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        logits.append(make_runner(model).prefill(0, ids).logits)
    torch.set_num_threads(1)
    assert torch.equal(*logits)


def test_a_model_in_bfloat16_is_nearer_to_its_exact_weights_than_its_own_code_is() -> None:
    model, ids = make_model("llama").to(torch.bfloat16), random_ids(30, 5)
    found, own = make_runner(model).prefill(0, ids).logits, whole_text_logits(model, ids)
    exact = whole_text_logits(make_model("llama").to(torch.bfloat16).double(), ids)
    assert (found - exact).abs().max() < (own - exact).abs().max()


def test_int8_is_the_model_with_rounded_rows_as_torchs_kernel_computes_it() -> None:
    model, ids = make_model("llama").float(), random_ids(30, 5)
    found = make_runner(model, quantize=True).prefill(0, ids).logits
    weight = model.lm_head.weight
    hidden = torch.randn(4, weight.shape[1])
    rounded, scales = quantize_rows(weight)
    kernel = torch._weight_int8pack_mm(hidden, rounded, scales)
    own = make_runner(model, quantize=True).compute_logits(hidden)
    torch.testing.assert_close(own, kernel, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                rounded, scales = quantize_rows(parameter)
                parameter.copy_(rounded.float() * scales[:, None])
    torch.testing.assert_close(found, whole_text_logits(model, ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, make_runner(make_model("llama").float()).prefill(0, ids).logits, atol=1e-3)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_restricted_vocabulary_has_the_bits_of_the_whole_one(family: str, dtype: torch.dtype, quantize: bool) -> None:
    model, token_ids = make_model(family).to(dtype), torch.tensor([5, 96, 3, 40, 41])
    check_restricted_logits(model, token_ids, quantize=quantize)


def test_a_restricted_vocabulary_keeps_the_softcap() -> None:
    changes = {**ATTENTION["gemma3_text"], "final_logit_softcapping": 2.0}
    model = make_stock_model("gemma3_text", changes).float()
    check_restricted_logits(model, torch.arange(0, 97, 3), quantize=False)


def check_restricted_logits(model: PreTrainedModel, token_ids: torch.Tensor, *, quantize: bool) -> None:
    ids = random_ids(21, 5)
    whole = make_runner(model, quantize=quantize).prefill(0, ids).logits
    restricted = make_runner(model, quantize=quantize, token_ids=token_ids).prefill(0, ids).logits
    expected = torch.full_like(whole, -math.inf)
    expected[token_ids] = whole[token_ids]
    assert torch.equal(restricted, expected)
    assert not torch.equal(whole, expected)


def test_training_in_place_changes_what_is_decoded() -> None:
    model, ids = make_model("llama").float(), random_ids(9, 5)
    runner = make_runner(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    torch.testing.assert_close(runner.prefill(0, ids).logits, whole_text_logits(model, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_size_decodes_in_the_memory_of_the_largest_with_the_bits_of_its_copy(dtype: torch.dtype) -> None:
    to_elastic = parse_conversion("elastic:shares=1-0.5,dims=both")
    batch = packed(9, 8, vocabulary=97)
    whole = export_model(to_elastic.convert(import_model(make_model("llama").float()), [batch])[0]).to(dtype)
    size = get_sizes(whole)[1]
    assert dict(size.units)["ffn"] < import_model(whole).blueprint.layers[0].ffn.width  # type: ignore[attr-defined]
    runners = [make_runner(slice_(whole, 0.5)) for slice_ in (slice_model, copy_size)]
    outputs = [runner.prefill(0, random_ids(13, 1)).features for runner in runners]
    assert torch.equal(*outputs)
    network = runners[0].reader.native  # type: ignore[attr-defined]
    addresses = {weight.untyped_storage().data_ptr() for weight in whole.parameters()}
    matrices = [tensor for tensor in network._tensors if tensor.ndim == 2]
    assert matrices
    assert {tensor.untyped_storage().data_ptr() for tensor in matrices} <= addresses
    assert any(tensor.stride(0) > tensor.shape[1] for tensor in matrices)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_families_decode_by_their_own_code(family: str) -> None:
    model = make_model(family).float()
    assert type(ModelRunner(model, vocabulary=97).reader) is SlotReader
    with pytest.raises(UsageError, match="cannot decode in int8 here"):
        ModelRunner(model, vocabulary=97, quantize=True)
    assert family in ATTENTION


def test_a_machine_without_a_compiler_decodes_by_the_models_own_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("INFO", "potstill")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("/nothing/cc", "false"):
        monkeypatch.setenv("CC", compiler)
        assert library.load_library.__wrapped__() is None
    monkeypatch.delenv("CC")
    monkeypatch.setattr(library, "COMPILERS", ())
    assert library.load_library.__wrapped__() is None
    assert "install gcc or clang" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_exponential_of_the_softmax_is_exact_to_rounding() -> None:
    model = make_model("llama").float()
    runner = make_runner(model)
    ids = random_ids(40, 8)
    exact = whole_text_logits(make_model("llama").float().double(), ids)
    assert float((runner.prefill(0, ids).logits - exact).abs().max()) < 1e-4 * math.sqrt(float(exact.abs().max()))
