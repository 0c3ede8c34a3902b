"""The tokenizer of a GGUF file: the right pre-tokenizer, scores that merge alike, ends of answers, and the template."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.models.gguf_export.test_file import merging_tokenizer
from tests.tiny import CHATML, byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from potstill.core.errors import UnsupportedModel
from potstill.models.gguf_export.tokenizer import SIGNS, WORDS, compute_scores, find_pre_tokenizer, write_tokenizer


def write(
    file: Path, tokenizer: PreTrainedTokenizerFast, *, vocabulary: int = 0, stop_tokens: tuple[int, ...] = (2, 0)
) -> dict[str, Any]:
    """The fields of a file that holds this tokenizer."""
    writer = gguf.GGUFWriter(file, "llama")
    write_tokenizer(writer, tokenizer, vocabulary=vocabulary or len(tokenizer), stop_tokens=stop_tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    names = {"tokenizer.ggml.": "", "tokenizer.": ""}
    fields = {}
    for name, field in gguf.GGUFReader(file).fields.items():
        for prefix, replacement in names.items():
            name = name.replace(prefix, replacement, 1)
        fields[name] = field.contents()
    return fields


def spelled(*steps: Any) -> PreTrainedTokenizerFast:
    """Bytes behind these steps of a pre-tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


def facts(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((pre_tokenizers.ByteLevel(add_prefix_space=False),), "gpt-2"),
        ((pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)), "smollm"),
        ((pre_tokenizers.Split(Regex(WORDS + r"\p{N}{1,3}" + SIGNS), "isolated"), BYTES), "llama-bpe"),
        ((pre_tokenizers.Split(Regex(WORDS + r"\p{N}" + SIGNS), "isolated"), BYTES), "qwen2"),
    ],
)
def test_a_pre_tokenizer_has_the_name_that_llama_cpp_gives_it(steps: tuple[Any, ...], name: str) -> None:
    tokenizer = spelled(*steps)
    assert find_pre_tokenizer(tokenizer, facts(tokenizer)) == name


def test_an_unknown_pre_tokenizer_is_refused_with_its_steps() -> None:
    tokenizer = spelled(pre_tokenizers.Split(Regex(r"\d+"), "isolated"), BYTES)
    with pytest.raises(UnsupportedModel, match="no pre-tokenizer known to potstill with these steps: Split, ByteLevel"):
        find_pre_tokenizer(tokenizer, facts(tokenizer))


@pytest.mark.slow
def test_the_packaged_model_has_the_pre_tokenizer_of_its_file() -> None:
    from potstill.models.spec import read_model_spec

    tokenizer = read_model_spec("smollm2").tokenizer
    assert find_pre_tokenizer(tokenizer, facts(tokenizer)) == "smollm"


def test_ends_of_answers_special_ids_and_the_template_are_fields(tmp_path: Path) -> None:
    fields = write(tmp_path / "a.gguf", merging_tokenizer(), vocabulary=264)
    assert fields["model"] == "gpt2"
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["eot_token_id"]) == (1, 2, 0)
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (False, False)
    assert fields["chat_template"] == CHATML
    assert fields["merges"] == ["h e"]
    assert fields["tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert fields["tokens"][260:] == ["[PAD260]", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert fields["token_type"] == [3] * 3 + [1] * 257 + [5] * 4


def sentence_pieces(*, prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece: words behind `▁`, and bytes for all other characters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdef"]
    merges = [("▁", "a"), ("b", "c"), ("▁a", "bc"), ("d", "e"), ("de", "f"), ("c", "d")]
    tokens += ["".join(pair) for pair in merges]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_have_scores_in_the_order_of_their_merges(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentence_pieces(prefix=prefix)
    fields = write(tmp_path / "a.gguf", tokenizer)
    assert (fields["model"], fields["pre"], fields["add_space_prefix"]) == ("llama", "default", prefix)
    assert fields["scores"][-6:] == [0, -1, -2, -3, -4, -5]
    assert fields["token_type"][:4] == [2, 3, 3, 6]
    assert compute_scores(tokenizer, 3, [("a", "b")]) == [-1.0] * 3


def test_transformers_reads_pieces_back(tmp_path: Path) -> None:
    tokenizer = sentence_pieces(prefix=True)
    write(tmp_path / "a.gguf", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("abc def", "a bc", "fed abcd", "x é"):
        assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_a_tokenizer_of_another_kind_is_refused_by_its_kind(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)))
    with pytest.raises(UnsupportedModel, match="of the kind BPE, and this one is Unigram"):
        write(tmp_path / "a.gguf", tokenizer)
