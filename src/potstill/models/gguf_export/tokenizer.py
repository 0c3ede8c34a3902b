"""The tokenizer of a GGUF file: tokens, merges or scores, the pre-tokenizer by llama.cpp's name, and special ids."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UnsupportedModel

SPACE = "▁"  # of SentencePiece
# The text whose ids identify a pre-tokenizer: llama.cpp, `convert_hf_to_gguf_update.py`.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
# SHA-256 of these ids as Python writes the list, in hexadecimal, by llama.cpp's name of the pre-tokenizer.
CHECK_DIGESTS = {
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a pre-tokenizer by its steps: the pattern of a split, or the step's own name
PRE_TOKENIZERS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (WORDS + r"\p{N}{1,3}" + SIGNS,): "llama-bpe",
    (WORDS + r"\p{N}" + SIGNS,): "qwen2",
}


def write_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, stop_tokens: Sequence[int]
) -> None:
    """Add a tokenizer to a `GGUFWriter`, with one token for each of the `vocabulary` rows of the embedding.

    The first of `stop_tokens` besides the end of text is the end of a turn.

    Raises: UnsupportedModel for a tokenizer that llama.cpp does not have.
    """
    facts = _read_facts(tokenizer)
    if _is_byte_level(facts):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(find_pre_tokenizer(tokenizer, facts))
        writer.add_token_merges([" ".join(pair) for pair in _list_merges(facts)])
    else:
        _check_sentence_piece(facts)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(tokenizer))
        writer.add_token_scores(compute_scores(tokenizer, vocabulary, _list_merges(facts)))
    tokens, kinds = list_tokens(tokenizer, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_special_ids(writer, tokenizer, vocabulary, stop_tokens)
    _write_template(writer, tokenizer)


def _read_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    if facts.get("model", {}).get("type") != "BPE":
        kind = facts.get("model", {}).get("type", type(tokenizer).__name__)
        raise UnsupportedModel(f"GGUF files of potstill hold tokenizers of the kind BPE, and this one is {kind}")
    return facts


def _is_byte_level(facts: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _list_steps(facts["pre_tokenizer"]))


def _list_steps(component: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, normalizer or decoder; those of a sequence one by one."""
    if component is None:
        return []
    nested = component.get("pretokenizers") or component.get("normalizers") or component.get("decoders")
    return [step for part in nested for step in _list_steps(part)] if nested else [dict(component)]


def _list_merges(facts: Mapping[str, Any]) -> list[Sequence[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in facts["model"]["merges"]]


def find_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]) -> str:
    """llama.cpp's name of a pre-tokenizer of bytes, by the ids of `CHECK_TEXT`, else by its steps.

    Raises: UnsupportedModel where llama.cpp has none of the same function.
    """
    ids = tokenizer(CHECK_TEXT, verbose=False).input_ids
    if name := CHECK_DIGESTS.get(hashlib.sha256(str(ids).encode()).hexdigest()):
        return name
    steps = tuple(filter(None, map(_describe_step, _list_steps(facts["pre_tokenizer"]))))
    normalizers = [step["type"] for step in _list_steps(facts["normalizer"]) if step["type"] != "NFC"]
    if steps not in PRE_TOKENIZERS or normalizers:
        kinds = [*normalizers, *(step["type"] for step in _list_steps(facts["pre_tokenizer"]))]
        raise UnsupportedModel(
            f"llama.cpp has no pre-tokenizer known to potstill with these steps: {', '.join(kinds)}; export with "
            f"--to hf and convert with llama.cpp's convert_hf_to_gguf.py"
        )
    return PRE_TOKENIZERS[steps]


def _describe_step(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel":
        return "words" if step["use_regex"] else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated":
        return str(step["pattern"].get("Regex", ""))
    return str(step["type"])


def _check_sentence_piece(facts: Mapping[str, Any]) -> None:
    steps = [*_list_steps(facts["normalizer"]), *_list_steps(facts["pre_tokenizer"])]
    allowed = {"Prepend", "Replace", "Metaspace", "Split"}
    if not facts["model"].get("byte_fallback") or (strange := {step["type"] for step in steps} - allowed):
        what = sorted(strange)[0] if facts["model"].get("byte_fallback") else "no fallback to bytes"
        raise UnsupportedModel(f"llama.cpp has no tokenizer of this kind ({what}); export with --to hf")


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.tokenize("a")[0].startswith(SPACE))


def compute_scores(tokenizer: PreTrainedTokenizerBase, vocabulary: int, merges: Sequence[Sequence[str]]) -> list[float]:
    """The score of each token: minus the rank of the first merge that makes it, since llama.cpp merges by score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    return [-float(ranks.get(tokens.get(i, ""), len(merges))) for i in range(vocabulary)]


def list_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[list[str], list[TokenType]]:
    """(text, kind) of each id; an id without a token is `[PAD17]`, which no text gives."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items() if i < vocabulary}
    texts, kinds = [], []
    for i in range(vocabulary):
        kind = _choose_kind(tokenizer, i, tokens.get(i))
        text = tokens.get(i, f"[PAD{i}]")
        texts.append(text.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else text)
        kinds.append(kind)
    return texts, kinds


def _choose_kind(tokenizer: PreTrainedTokenizerBase, i: int, token: str | None) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    added = tokenizer.added_tokens_decoder.get(i)
    if added is not None:
        looks_special = token.startswith(("<|", "<｜", "<unused")) and token.endswith(">")
        if added.special or looks_special or token in ("<pad>", "<mask>"):
            return TokenType.UNKNOWN if token == "<unk>" else TokenType.CONTROL
        return TokenType.USER_DEFINED
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _write_special_ids(
    writer: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_tokens: Sequence[int]
) -> None:
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stop_tokens), None)
    other_ends = [i for i in stop_tokens if i != eos]
    ids = {"bos": tokenizer.bos_token_id, "eos": eos, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    ids |= dict(zip(("eot", "eom"), other_ends, strict=False))
    for name, value in ids.items():
        if value is not None and value < vocabulary:
            getattr(writer, f"add_{name}_token_id")(value)
    sample = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and sample[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and sample[-1] == tokenizer.eos_token_id)


def _write_template(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
