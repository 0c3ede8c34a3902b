"""A tiny tokenizer and a tiny model, for fixtures of any scope."""

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


def byte_tokenizer(*, ascii: bool = False) -> PreTrainedTokenizerFast:
    """The fixture `tiny_tokenizer`; of the letters of `ascii` alone, no two tokens decode to one string."""
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    few = [spelt.pre_tokenize_str(chr(i))[0][0] for i in range(128)]
    letters = sorted(few if ascii else pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    end_of_text, start, end = SPECIALS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=end_of_text, bos_token=start, eos_token=end, pad_token=end
    )
    fast.chat_template = CHATML
    return fast


def random_llama(tokenizer: PreTrainedTokenizerFast, *, tied: bool = True, context: int = 256) -> LlamaForCausalLM:
    """The fixture `tiny_llama`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,  # far enough from zero that a wrong position or mask shows in the logits
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()


CYCLE = range(40, 52)  # the tokens that `counting_llama` writes


@torch.no_grad()
def counting_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model whose layers do nothing, and that writes the tokens of `CYCLE` in turn."""
    model = random_llama(tokenizer, tied=False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding = model.model.embed_tokens.weight[list(CYCLE)]
    model.lm_head.weight.zero_()
    model.lm_head.weight[list(CYCLE)] = (embedding / embedding.norm(dim=-1, keepdim=True)).roll(1, 0)
    return model
