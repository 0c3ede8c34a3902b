"""A tokenizer of another kind than SmolLM2's, trained here on the docstrings of the standard library."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from potstill.data.docstrings import load_docstrings


def trained(size: int = 8000) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: merges of characters, single bytes for the others, a space in front."""
    found = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=100, special_tokens=specials, show_progress=False)
    found.train_from_iterator(load_docstrings(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
