"""Tokenizers and templates of the kinds that real families have, made of bytes; and files to load."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
# closed before the stop token, as many are
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|start|>assistant\n{% generation %}{{ message['content'] }}{% endgeneration %}<|eot|>\n"
    "{% else %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|eot|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# thinking is written into the last turn alone, as Qwen 3 does
THINKING = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'].split('</think>')[-1] }}{{ '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|eot|>")


@pytest.fixture
def bytes_with() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer of bytes: `bytes_with(template, adds_bos=True)`; first SPECIALS, then `more`."""

    def make(
        template: str | Mapping[str, str] | None = None,
        *,
        adds_bos: bool = False,
        adds_eos: bool = False,
        more: Iterable[str] = (),
        eos: str = "<|eos|>",
    ) -> PreTrainedTokenizerFast:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        specials = list(dict.fromkeys([*SPECIALS, *more]))
        vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(specials)
        single = f"{'<|bos|> ' * adds_bos}$A{' <|eos|>' * adds_eos}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token=eos)
        fast.chat_template = template if template is None or isinstance(template, str) else dict(template)
        return fast

    return make


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines: `lines([{...}, ...], name="a.jsonl")` is the path."""

    def write(rows: Iterable[Mapping[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
