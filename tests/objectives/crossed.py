"""Batches of the same texts as two tokenizers read them, with every table that says which rows belong together."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.types import ALIGNED_GROUPS, ALIGNED_PAIRS, EDIT_ALIGNED_PAIRS, IGNORE
from potstill.data.cross_tokenizer.token_spans import locate_tokens
from potstill.data.packing import collate
from potstill.models.tokenizers.token_bytes import read_token_bytes
from potstill.ops.align import match_spans, merge_spans
from potstill.ops.edit_distance import dtw_path, edit_distance_table, find_single_matches
from potstill.train.training_module import TrainingModule

TEXTS = (  # with much that both read byte by byte, since training a tokenizer breaks ties as it likes
    "The quick brown fox jumps, naïve 世界. 0918273645KJHGZXCVWQ",
    "def read(path): 246813579MNBVCXZLKJH0192837465",
    "  party 🎉 with   spaces and a dog 7531902468ZQXWVKJH",
)


class Read(NamedTuple):
    """One document as one network reads it: its rows' own tokens as strings, the spans of what they predict."""

    ids: Tensor
    labels: Tensor
    spans: Tensor
    own: list[bytes]


def read(text: str, tokenizer: PreTrainedTokenizerFast, prompt: int) -> Read:
    """`text` with an end, trained from byte `prompt` on."""
    known = read_token_bytes(tokenizer)
    (found,) = locate_tokens([text], tokenizer, known)
    ids = torch.cat([found.ids, torch.tensor([tokenizer.eos_token_id])])
    spans = torch.cat([found.spans, torch.full((1, 2), len(text.encode()))])
    labels = torch.where(spans[:, 0] >= prompt, ids, IGNORE)
    labels[0] = IGNORE
    trained = labels[1:] != IGNORE
    own = [known.by_id[i].strip() for i in ids[:-1][trained].tolist()]
    return Read(ids, labels, spans[1:][trained], own)


def batch_of(
    texts: Sequence[str], ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast, *, prompt: int = 3
) -> dict[str, Tensor]:
    """A packed batch with pairs, warped rows and groups."""
    sides = [[read(text, tokenizer, prompt) for text in texts] for tokenizer in (ours, theirs)]
    batch, teacher = (
        collate([{"input_ids": r.ids, "labels": r.labels, "lengths": torch.tensor([len(r.ids)])} for r in side])
        for side in sides
    )
    pairs, near, groups, total = [], [], ([], []), 0
    before = torch.zeros(2, 1, dtype=torch.long)
    for mine, yours in zip(*sides, strict=True):
        pairs.append(match_spans(mine.spans, yours.spans).T + before)
        only = find_single_matches(dtw_path(edit_distance_table(yours.own, mine.own)), len(mine.own))
        kept = (only >= 0).nonzero()[:, 0]
        near.append(torch.stack([kept, only[kept]]) + before)
        first, second, more = merge_spans(mine.spans, yours.spans)
        for side, group in zip(groups, (first, second), strict=True):
            side.append(torch.where(group >= 0, group + total, -1))
        total += more
        before = before + torch.tensor([[len(mine.own)], [len(yours.own)]])
    tables = {
        ALIGNED_PAIRS: torch.cat(pairs, 1),
        EDIT_ALIGNED_PAIRS: torch.cat(near, 1),
        **dict(zip(ALIGNED_GROUPS, map(torch.cat, groups), strict=True)),
    }
    others = {f"teacher.{key}": tensor for key, tensor in teacher.items()}
    return {**batch, **tables, **others}


def llama(tokenizer: PreTrainedTokenizerFast, width: int, seed: int, *, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama that speaks `tokenizer`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).double().eval()


def taught(study: TrainingModule, batch: Mapping[str, Tensor]) -> TrainingModule:
    """`study` with a dual space's maps trained on `batch`, so that what counts where they are right counts for some."""
    own = [weight for name, weight in study.named_parameters() if name.startswith("objective.")]
    if any(name.endswith("_projector") for name in study.term_names):
        optimiser = torch.optim.Adam(own, lr=0.05)
        for _ in range(20):
            study.zero_grad()
            study(**batch)["loss"].backward()
            optimiser.step()
    found = dict(zip(study.term_names, study(**batch)["sums"].tolist(), strict=True))
    assert all(value for name, value in found.items() if not name.endswith("_runs")), found
    return study
