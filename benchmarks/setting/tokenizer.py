"""A tokenizer of another kind than SmolLM2's, trained on the docstrings of the standard library."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from potstill.data.docstrings import load_docstrings


def train_tokenizer(size: int = 8000) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: merges of characters, byte fallback, a leading space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=100, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(load_docstrings(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
