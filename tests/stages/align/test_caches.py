"""A cache in place of a frozen network: the same numbers and the same shuffle, and what it refuses."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.stages.align.conftest import make_row
from tests.stages.world import written

from potstill.core.errors import CacheMismatch, UsageError
from potstill.data.packing import collate
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prepare import prepare
from potstill.stages.align.run import align
from potstill.stages.cache_teacher import CacheTeacherConfig


def write_cache(config: AlignConfig, folder: Path, **options: object) -> AlignConfig:
    """The run with a cache of its own model in place of the reference; held-out pairs are those of the data."""
    kind: dict[str, object] = {"own": True, "context": config.settings.context, "dtype": config.dtype, **options}
    stage = CacheTeacherConfig(teacher=config.model, data=config.data, **kind)  # type: ignore[arg-type]
    stage.run(folder, show=False)
    return replace(config, eval_data=None, reference_cache=str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_reference_gives_the_loss_and_the_gradient_of_a_live_one(
    config: AlignConfig, tmp_path: Path, dtype: str
) -> None:
    live = replace(config, dtype=dtype, eval_data=None)
    runs = [prepare(live), prepare(write_cache(live, tmp_path / "cache"))]
    assert runs[0].packs.digest == runs[1].packs.digest, "a cache changes no shuffle"
    losses, gradients = [], []
    for run in runs:
        with torch.no_grad():
            run.student.lm_head.weight[40:60] *= 1.1  # a policy that has moved
        loss = run.module.train()(**collate([run.packs[0]]))["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([weight.grad.flatten() for weight in run.student.parameters()]))
    assert losses[0] != pytest.approx(math.log(2), abs=1e-3)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6 if dtype == "float32" else 1e-3)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > (0.9999999 if dtype == "float32" else 0.9999)


def test_dpo_begins_at_log_2_with_a_cache_and_its_card_names_the_model(config: AlignConfig, tmp_path: Path) -> None:
    cached = write_cache(config, tmp_path / "cache")
    settings = replace(config.settings, tokens=256)
    result = align(replace(cached, settings=settings), tmp_path / "made", show=False)
    assert result.before_training.preference_loss.value == pytest.approx(math.log(2), abs=1e-5)
    assert {measure.name for measure in result.before_training}.isdisjoint({"reference_kl"})
    assert [(parent.role, parent.name) for parent in result.card.parents][1] == ("reference", config.model)


def test_a_cache_of_distributions_is_refused(config: AlignConfig, tmp_path: Path) -> None:
    cached = write_cache(config, tmp_path / "cache", own=False, top_k=4)
    with pytest.raises(UsageError, match=r"holds distributions of top-k tokens.*make one with potstill cache --own"):
        prepare(cached)


def test_a_cache_of_other_text_is_refused(config: AlignConfig, tmp_path: Path) -> None:
    cached = write_cache(config, tmp_path / "cache")
    other = written(tmp_path / "other.jsonl", [make_row(number) for number in range(100, 140)])
    with pytest.raises(CacheMismatch, match=r"was made with text .*, and this run has .*; use the sources it was made"):
        prepare(replace(cached, data=str(other)))


def test_a_cache_of_shorter_documents_says_which_context_it_has(config: AlignConfig, tmp_path: Path) -> None:
    long = {**make_row(99), "rejected": "99 is odd? " * 5}
    data = written(tmp_path / "long.jsonl", [*(make_row(number) for number in range(30)), long])
    cached = write_cache(replace(config, data=str(data)), tmp_path / "cache", context=80)
    with pytest.raises(
        CacheMismatch, match=r"at most 80 tokens.*give --context 80, or make the cache with --context 128"
    ):
        prepare(replace(cached, eval_data=None))


def test_a_cache_as_the_reference_model_and_other_data_than_preferences_are_refused(
    config: AlignConfig, tmp_path: Path, text: Path
) -> None:
    write_cache(config, tmp_path / "cache")
    with pytest.raises(UsageError, match="is a cache; give it as --reference-cache"):
        prepare(replace(config, reference=str(tmp_path / "cache")))
    stage = CacheTeacherConfig(teacher=config.model, data=str(text), own=True)
    with pytest.raises(UsageError, match=r"--own stores the log-probabilities of preferences, and .* holds text"):
        stage.run(tmp_path / "text", show=False)
    with pytest.raises(UsageError, match="--own stores one number a token"):
        CacheTeacherConfig(teacher=config.model, own=True, hidden=True)


def test_a_cache_of_pairs_serves_no_other_held_out_data_and_no_kto(config: AlignConfig, tmp_path: Path) -> None:
    cached = write_cache(config, tmp_path / "cache")
    assert config.eval_data is not None
    with pytest.raises(UsageError, match="those of --eval-data are not in it; omit --eval-data"):
        prepare(replace(cached, eval_data=config.eval_data))
    with pytest.raises(CacheMismatch, match="kto compares with answers to other prompts, which the cache of pairs"):
        prepare(replace(cached, objective="kto"))
