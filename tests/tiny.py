"""A model and a tokenizer small enough to be made anew in every test."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, in SmolLM2's manner: 259 ids, ChatML, `<|im_end|>` both ends a turn and pads.

    Ids 0 to 2 are `<|endoftext|>` (unknown), `<|im_start|>` (BOS) and `<|im_end|>` (EOS = pad). Any text comes back as
    it went in.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *letters])}
    of_bytes = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    of_bytes.add_special_tokens(list(SPECIALS))
    end_of_text, start, end = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=of_bytes, unk_token=end_of_text, bos_token=start, eos_token=end, pad_token=end
    )
    fast.chat_template = CHATML
    return fast


def llama(speaks: PreTrainedTokenizerFast, *, tied: bool = True, context: int = 256) -> LlamaForCausalLM:
    """A random Llama, always the same one: 3 layers of width 32, 4 heads on 2 key/value heads, in eval mode."""
    config = LlamaConfig(
        vocab_size=len(speaks),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,  # far enough from zero that a wrong position or mask shows in the logits
        tie_word_embeddings=tied,
        bos_token_id=speaks.bos_token_id,
        eos_token_id=speaks.eos_token_id,
        pad_token_id=speaks.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()
