"""Student and teacher of an objective's step: with one tokenizer, or with two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from setting.pair import pair
from setting.products import Network
from setting.text import CONTEXT
from setting.tokenizer import trained


def both(teacher: str | None, *, quick: bool) -> Any:
    """Both as objectives want to know them: the pair of the benchmarks, or its student under another `teacher`."""
    from potstill.models import gguf, load
    from potstill.objectives.model_info import ModelInfo, PairInfo

    tokenizer = gguf.load_tokenizer(load.get_packaged_path())
    if quick:
        own, student = llama(len(tokenizer), 64, 2).bfloat16(), llama(len(tokenizer), 32, 1)
    else:
        own, student = pair()
    if teacher is None:
        return PairInfo(ModelInfo(student, tokenizer), ModelInfo(own, tokenizer))
    other = load.load_model(teacher, dtype=torch.bfloat16)
    return PairInfo(ModelInfo(student, tokenizer), ModelInfo(other.model, other.tokenizer))


def translating(sides: Any, *, warped: bool) -> Callable[[Any], Any]:
    """What adds the teacher's reading to a pack."""
    from potstill.data.cross_tokenizer.packs import CrossTokenizerPacks, TokenizerInfo

    readers = (TokenizerInfo.from_tokenizer(one.tokenizer) for one in (sides.student, sides.teacher))
    return CrossTokenizerPacks([], *readers, needs_edit_alignment=warped).add_teacher_inputs


def sizes(sides: Any, batch: Any, *, across: bool) -> list[Network]:
    """What student and teacher are in a step on `batch`."""
    from potstill.core.types import get_view, supervised_positions
    from potstill.evaluate.size import list_matrix_shapes
    from potstill.models.families.registry import read_blueprint

    found = []
    for name, vocabulary in zip(("student", "teacher"), sides.vocabularies, strict=True):
        side, own = getattr(sides, name), get_view(batch, name) if across else batch
        blocks = list_matrix_shapes(read_blueprint(side.model.config))
        found.append(
            Network(own["input_ids"].numel(), len(supervised_positions(own)[1]), side.width, vocabulary, blocks)
        )
    return found


def random_teacher(folder: Path, *, quick: bool) -> str:
    """A folder with a random Llama and a tokenizer of its own."""
    tokenizer = trained(1000 if quick else 16_000)
    model = llama(len(tokenizer), 64, 2) if quick else llama(len(tokenizer), 768, 20)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(vocabulary: int, width: int, layers: int) -> Any:
    """A random Llama with the proportions of small ones: heads of 64, three or four queries to a key."""
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
