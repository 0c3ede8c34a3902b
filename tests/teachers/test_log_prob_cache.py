"""A cache of the log-probabilities of the text: its bytes, its precision, and what it refuses."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import CacheMismatch, UnsupportedModel, UsageError
from potstill.core.types import IGNORE, NEXT_TOKEN_LOG_P, Needs, supervised_positions
from potstill.data.packing import Packs, collate, pack
from potstill.data.shared_prompts import build_group
from potstill.data.token_dataset import TokenizedDocument
from potstill.models.load import LoadedModel
from potstill.models.signals import compute_signals
from potstill.objectives.row_terms import compute_target_log_probs
from potstill.teachers.cache_folder import publish_cache
from potstill.teachers.cached import TeacherCache, find_faults
from potstill.teachers.log_prob_cache import LogProbCache, LogProbWriter


@pytest.fixture
def packs() -> Packs:
    rows = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
    return pack([TokenizedDocument(ids, [IGNORE, IGNORE, *ids[2:]]) for ids in rows], length=8)


@pytest.fixture
def loaded(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> LoadedModel:
    return LoadedModel(tiny_llama, tiny_tokenizer, "tiny", tmp_path, None, "0" * 64)


def write(loaded: LoadedModel, packs: Packs, folder: Path, dtype: torch.dtype = torch.float32) -> LogProbCache:
    writer = LogProbWriter(teacher=loaded, packs=packs, dtype=dtype, seed=1)
    training = folder / "training"
    training.mkdir(parents=True)
    with torch.no_grad():
        writer.write(training, on_progress=lambda number: None)
    manifest = writer.build_manifest(training, writer.compute_facts("text", context=8), {"teacher": "tiny"})
    publish_cache(training, folder, manifest)
    return LogProbCache(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_gives_the_log_probabilities_of_float32_weights_under_autocast(
    loaded: LoadedModel, packs: Packs, tmp_path: Path, dtype: torch.dtype
) -> None:
    cache = write(loaded, packs, tmp_path / "cache", dtype)
    assert cache.manifest.facts.dtype == str(dtype).removeprefix("torch.")
    for number in range(len(packs)):
        batch = collate([packs[number]])
        positions, targets, _ = supervised_positions(batch)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            signals = compute_signals(loaded.model, batch, Needs(positions), vocabulary=loaded.vocabulary)
            expected = compute_target_log_probs(signals, targets).float()
        assert torch.equal(cache.signals(batch, Needs(positions)).scores[NEXT_TOKEN_LOG_P], expected)


def test_a_row_takes_four_bytes_and_every_other_file_is_the_manifest(
    loaded: LoadedModel, packs: Packs, tmp_path: Path
) -> None:
    cache = write(loaded, packs, tmp_path / "cache")
    assert cache.manifest.rows == packs.num_trained == 6
    assert sum(shard.get_slice("log_p").get_shape()[0] for shard in cache.shards) == 6
    assert str(cache.shards[0].get_slice("log_p").get_dtype()) == "F32"
    assert sorted(file.name for file in cache.folder.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert not list(find_faults(cache.folder))


def test_a_document_is_found_in_whatever_pack_it_lies(loaded: LoadedModel, packs: Packs, tmp_path: Path) -> None:
    cache = write(loaded, packs, tmp_path / "cache")
    whole = collate([packs[number] for number in range(len(packs))])
    parts = [collate([packs[number]]) for number in range(len(packs))]
    log_p = [cache.signals(b, Needs(supervised_positions(b)[0])).scores[NEXT_TOKEN_LOG_P] for b in (whole, *parts)]
    assert torch.equal(log_p[0], torch.cat(log_p[1:]))


def test_it_has_no_distributions_and_no_window_of_other_text(loaded: LoadedModel, packs: Packs, tmp_path: Path) -> None:
    cache = write(loaded, packs, tmp_path / "cache")
    batch = collate([packs[0]])
    signals = cache.signals(batch, Needs(supervised_positions(batch)[0]))
    with pytest.raises(UnsupportedModel, match="has no distributions; run the reference instead"):
        signals.logits(signals.rows)
    other = collate([pack([TokenizedDocument([20, 21, 22], [IGNORE, 21, 22])], length=8)[0]])
    with pytest.raises(CacheMismatch, match="a window of 3 tokens is not in the cache"):
        cache.signals(other, Needs(supervised_positions(other)[0]))


def test_distillation_refuses_log_probabilities_of_the_text_alone(
    loaded: LoadedModel, packs: Packs, tmp_path: Path
) -> None:
    cache = write(loaded, packs, tmp_path / "cache")
    with pytest.raises(UsageError, match="for potstill align; make one without --own"):
        TeacherCache(cache.folder)


def pairs(*, shared: bool) -> Packs:
    """Two pairs, whose answers share a prompt or repeat it; the prompts end alike, and so do the answers."""
    rows = []
    for number, prompt in enumerate(([5, 6, 7], [8, 6, 7])):
        wholes = [TokenizedDocument([*prompt, *answer], [IGNORE] * 3 + answer) for answer in ([9, 10], [11])]
        rows += build_group(wholes, (0, 1), group=number, shared=shared)
    return pack(rows, length=12)


@pytest.mark.parametrize("written", [True, False])
def test_a_cache_of_shared_prompts_is_read_for_repeated_ones_and_the_other_way_round(
    loaded: LoadedModel, tmp_path: Path, written: bool
) -> None:
    cache = write(loaded, pairs(shared=written), tmp_path / "cache")
    for data_set in (pairs(shared=True), pairs(shared=False)):
        batch = collate([data_set[number] for number in range(len(data_set))])
        positions, targets, _ = supervised_positions(batch)
        with torch.no_grad():
            expected = compute_target_log_probs(compute_signals(loaded.model, batch, Needs(positions)), targets)
        found = cache.signals(batch, Needs(positions)).scores[NEXT_TOKEN_LOG_P]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    other = collate([pairs(shared=True)[0]])
    other["input_ids"] = torch.where(other["position_ids"] == 0, 12, other["input_ids"])  # another prompt
    with pytest.raises(CacheMismatch, match="a window of 5 tokens is not in the cache"):
        cache.signals(other, Needs(supervised_positions(other)[0]))


def test_a_window_is_asked_for_with_its_prompt(loaded: LoadedModel, tmp_path: Path) -> None:
    cache = write(loaded, pairs(shared=False), tmp_path / "cache")
    rows = [
        row
        for number, prompt in enumerate(([5, 6, 7], [3, 6, 7]))
        for row in build_group(
            [TokenizedDocument([*prompt, *answer], [IGNORE] * 3 + answer) for answer in ([9, 10], [11])],
            (0, 1),
            group=number,
        )
    ]
    packs = pack(rows, length=12, keep_window=cache.has_window)
    assert packs.counts.dropped_groups == 1
    assert packs[0]["input_ids"].tolist() == [5, 6, 7, 9, 10, 7, 11]
