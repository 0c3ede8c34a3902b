"""Student and teacher for a step of an objective, with one tokenizer or with two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from setting.pair import load_pair
from setting.products import Network
from setting.text import CONTEXT
from setting.tokenizer import train_tokenizer


def build_pair_info(teacher: str | None, *, quick: bool) -> Any:
    """Student and teacher as objectives need them: the benchmarks' pair, or its student with another `teacher`."""
    from potstill.models import gguf, load, locate
    from potstill.objectives.model_info import ModelInfo, PairInfo

    tokenizer = gguf.load_tokenizer(locate.get_packaged_path())
    if quick:
        same_teacher, student = make_llama(len(tokenizer), 64, 2).bfloat16(), make_llama(len(tokenizer), 32, 1)
    else:
        same_teacher, student = load_pair()
    if teacher is None:
        return PairInfo(ModelInfo(student, tokenizer), ModelInfo(same_teacher, tokenizer))
    loaded = load.load_model(teacher, dtype=torch.bfloat16)
    return PairInfo(ModelInfo(student, tokenizer), ModelInfo(loaded.model, loaded.tokenizer))


def make_translator(pair_info: Any, *, warped: bool) -> Callable[[Any], Any]:
    """A function that adds the teacher's tokens to a pack."""
    from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo

    readers = (
        TokenizerInfo.from_tokenizer(model_info.tokenizer) for model_info in (pair_info.student, pair_info.teacher)
    )
    return CrossTokenizerPacks([], *readers, needs_edit_alignment=warped).add_teacher_inputs


def list_network_sizes(pair_info: Any, batch: Any, *, across: bool) -> list[Network]:
    """The sizes of student and teacher in a step on `batch`."""
    from potstill.core.types import get_view, supervised_positions
    from potstill.evaluate.size import list_matrix_shapes
    from potstill.models.families.registry import read_blueprint

    networks = []
    for name, vocabulary in zip(("student", "teacher"), pair_info.vocab_sizes, strict=True):
        side, same_teacher = getattr(pair_info, name), get_view(batch, name) if across else batch
        blocks = list_matrix_shapes(read_blueprint(side.model.config))
        networks.append(
            Network(
                same_teacher["input_ids"].numel(),
                len(supervised_positions(same_teacher)[1]),
                side.hidden_size,
                vocabulary,
                blocks,
            )
        )
    return networks


def make_random_teacher(folder: Path, *, quick: bool) -> str:
    """A folder with a random Llama and its own tokenizer."""
    tokenizer = train_tokenizer(1000 if quick else 16_000)
    model = make_llama(len(tokenizer), 64, 2) if quick else make_llama(len(tokenizer), 768, 20)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_llama(vocabulary: int, width: int, layers: int) -> Any:
    """A random Llama with the proportions of small ones: heads of width 64, three or four queries per key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=4 * CONTEXT,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()
