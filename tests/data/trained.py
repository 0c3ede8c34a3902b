"""Tiny tokenizers of the kinds that language models have, trained on a few lines."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def read(path):\n    return open(path).read()\n",
    "Ein schöner Tag in München; naïve café, Übergröße.",
    "世界 こんにちは 안녕하세요 世界の天気",
    "🎉👩‍👩‍👧 party 🎉🎉  with   spaces",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _opened_by_bos(tokenizer: Tokenizer) -> None:
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])


@cache
def byte_level(size: int = 400, *, nfc: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind (SmolLM2, Llama 3, Qwen): merges of bytes, no BOS; with `nfc`, Qwen's normaliser too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return _fast(tokenizer)


@cache
def sentencepiece(size: int = 420, *, scheme: str = "first") -> PreTrainedTokenizerFast:
    """Llama 2's kind: merges of characters, single bytes for those it does not know, a space in front, a BOS.

    With `scheme` "always", a space comes behind each special token too, as older ones have it; with "never", none
    (Gemma).
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=size, limit_alphabet=40, special_tokens=specials, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(LINES, trainer)
    _opened_by_bos(tokenizer)
    return _fast(tokenizer)


@cache
def unigram(*, rewrites: bool = False) -> PreTrainedTokenizerFast:
    """T5's and XLNet's kind, unknown characters as one token; with `rewrites`, the text in NFKC and lower case."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if rewrites:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    _opened_by_bos(tokenizer)
    return _fast(tokenizer)


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: spaces are lost, a word that goes on is marked."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return _fast(tokenizer)


EXACT = {  # kinds whose tokens, put together, are the text
    "byte-level": byte_level,
    "SentencePiece": sentencepiece,
    "SentencePiece, older": lambda: sentencepiece(scheme="always"),
    "SentencePiece without a space in front": lambda: sentencepiece(scheme="never"),
}
ROUGH = {  # kinds that lose or rewrite some of it
    "byte-level in NFC": lambda: byte_level(nfc=True),
    "Unigram": unigram,
    "Unigram in NFKC and lower case": lambda: unigram(rewrites=True),
    "WordPiece": wordpiece,
}
