"""Model folders as people have them, as teacher and student of a run: adapters, surplus ids, quantized weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models.folders import compute_logits, edit_json, save_folder
from tests.stages.world import written
from tests.tiny import byte_tokenizer

from potstill.core.errors import UnsupportedModel, VocabularyMismatch
from potstill.models.load import load_model
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.models import load_models
from potstill.stages.distill.prepare import prepare
from potstill.stages.distill.run import distill
from potstill.stages.measure import MeasureConfig
from potstill.stages.prune import PruneConfig
from potstill.train.config import TrainConfig

SETTINGS = TrainConfig(tokens=128, context=64, batch_tokens=128, micro_tokens=64)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter beside its base."""
    save_folder(tmp_path / "base", tied=True)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load_model(tmp_path / "base").model, config).save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="../base")
    return tmp_path / "adapter"


@pytest.fixture
def surplus(tmp_path: Path) -> Path:
    """A model of 259 rows with a tokenizer of 261 ids."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<word>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return save_folder(tmp_path / "surplus", tied=True, tokenizer=tokenizer)


@pytest.fixture
def config(adapter: Path, surplus: Path, text: Path) -> DistillConfig:
    return DistillConfig(
        teacher=str(adapter), student=str(surplus), data=str(text), settings=SETTINGS, dtype="float32", documents=2
    )


def test_a_student_with_surplus_ids_learns_from_an_adapter(config: DistillConfig, tmp_path: Path) -> None:
    result = distill(config, tmp_path / "made", show=False)
    card = result.card.to_dict()
    teacher = load_model(config.teachers[0].location or "")
    assert [parent["digest"] for parent in card["parents"]][1] == teacher.digest
    assert "adapter merged into" in card["parents"][1]["note"]
    saved = load_model(tmp_path / "made")
    assert torch.equal(compute_logits(saved.model), compute_logits(result.model))


def test_the_shared_vocabulary_ends_at_the_last_row(config: DistillConfig, surplus: Path) -> None:
    pair = load_models(replace(config, teacher=str(surplus)), {}, torch.float32)
    assert len(pair.origin.tokenizer) == 261
    assert pair.vocabulary == 259


def test_an_adapter_is_a_student_and_can_be_pruned(config: DistillConfig, adapter: Path, text: Path) -> None:
    pair = load_models(replace(config, student=str(adapter)), {}, torch.float32)
    expected = compute_logits(load_model(adapter).model)
    assert torch.equal(compute_logits(pair.student), expected)
    pruned, _ = PruneConfig(model=str(adapter), data=str(text), shape={"layers": 3}).apply(load_model(adapter))
    assert torch.allclose(compute_logits(pruned), expected, atol=1e-5)


def test_a_text_with_an_id_without_a_row_is_refused_with_both_counts(
    config: DistillConfig, surplus: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"a <word> that was added, number {i}"} for i in range(40)]
    data = str(written(tmp_path / "words.jsonl", rows))
    says = r"'<word>' \(id 259\).* 261 ids exceed the 259 rows"
    with pytest.raises(VocabularyMismatch, match=says):
        prepare(replace(config, data=data))
    with pytest.raises(VocabularyMismatch, match=says):
        MeasureConfig(models=(str(surplus),), data=data, split="all", context=64, documents=2, speed=False).run()
    prune_config = PruneConfig(model=str(surplus), data=data, keep=0.755)
    with pytest.raises(VocabularyMismatch, match=says):
        prune_config.apply(load_model(surplus))


def test_a_quantized_student_is_refused_before_any_weights_are_read(
    config: DistillConfig, surplus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_json(surplus / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr("potstill.stages.run_models.load_model", pytest.fail)
    monkeypatch.setattr("potstill.stages.transform.load_model", pytest.fail)
    says = r"quantized \(gptq\), so it can only be a --teacher"
    with pytest.raises(UnsupportedModel, match=says):
        load_models(config, {}, torch.float32)
    with pytest.raises(UnsupportedModel, match=says):  # the teacher, which is pruned
        load_models(replace(config, teacher=str(surplus), student=None, keep=0.5), {}, torch.float32)
    with pytest.raises(UnsupportedModel, match=says):
        PruneConfig(model=str(surplus), data=config.data, keep=0.5).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
