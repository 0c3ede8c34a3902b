"""What an alignment refuses before it reads a model or data, one sentence each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.stages.world import saved
from tests.tiny import CHATML, byte_tokenizer, random_llama

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.options import LEARNING_RATE, LORA_LEARNING_RATE
from potstill.stages.align.prepare import prepare
from potstill.stages.distill.config import DistillConfig

OPTIONS: dict[str, Any] = {"model": "smollm2", "data": "preferences.jsonl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "forward_kl"}, "forward_kl trains on text; use potstill distill"),
        ({"objective": "cross_entropy"}, "cross_entropy trains on text; use potstill distill"),
        ({"objective": "dpo+0.1*forward_kl"}, "forward_kl learns from a teacher; use potstill distill, or omit it"),
        ({"objective": "dpo+0.1*cross_entropy"}, "cross_entropy would train rejected answers too; omit it"),
        (
            {"objective": "dpo+0.1*ipo"},
            "--objective dpo, ipo is a sum, and preferences have one loss; give one of them",
        ),
        ({"data": ""}, "no data is given; give --data"),
        ({"reference": "a", "reference_cache": "b"}, "--reference-cache takes its place; give one of them"),
        ({"objective": "simpo", "reference": "a"}, "simpo compares with no reference model; omit --reference"),
        ({"plus": "a"}, "dpo compares with no plus model; omit --plus"),
        ({"reward": "accuracy"}, "--reward is for grpo, which samples answers; dpo reads them from the data"),
        ({"samples": 4}, "--samples is for grpo"),
        ({"max_tokens": 9}, "--max-tokens is for grpo"),
        ({"samples": 1}, "--samples is 1; answers to a prompt are compared with one another, so give at least 2"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"on_policy": 2.0}, "--on-policy is 2.0; it must be a share of the prompts, from 0 to 1"),
        ({"on_policy": 0.5}, "--on-policy is for aligndistil, and dpo needs answers that are judged; omit it"),
        ({"documents": 0}, "documents is 0; measuring needs at least one"),
        ({"lora": -1}, "--lora is -1; it is a rank"),
        ({"lora": 1, "train": "mlp"}, "--lora trains adapters, and --train names other weights to train"),
        ({"objective": "dpp"}, "there is no objective 'dpp'.*dpo"),
        ({"objective": "dpo:beta=-1"}, "beta is -1; choose a positive number"),
    ],
)
def test_an_option_that_contradicts_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AlignConfig.from_options({**OPTIONS, **options}).loss.build()


def test_an_objective_of_preferences_is_refused_by_distill() -> None:
    objective = AlignConfig.from_options(OPTIONS).loss
    with pytest.raises(UsageError, match="dpo trains on preferences; use potstill align"):
        DistillConfig(teacher="smollm2", keep=0.5, objective=objective)


def test_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="no model is given; give MODEL, such as smollm2"):
        AlignConfig.from_options({"data": "preferences.jsonl"})


def test_the_learning_rate_depends_on_lora_and_one_epoch_is_the_default() -> None:
    rates = [AlignConfig.from_options({**OPTIONS, "lora": rank}).settings.learning_rate for rank in (0, 8)]
    assert rates == [LEARNING_RATE, LORA_LEARNING_RATE]
    assert AlignConfig.from_options({**OPTIONS, "lora": 8, "lr": 1e-6}).settings.learning_rate == 1e-6
    settings = AlignConfig.from_options(OPTIONS).settings
    assert (settings.tokens, settings.epochs) == (None, 1.0)
    assert AlignConfig.from_options({**OPTIONS, "tokens": 4096}).settings.epochs is None
    assert AlignConfig.from_options({**OPTIONS, "epochs": 2}).settings.epochs == 2.0


def test_a_reference_with_another_tokenizer_is_refused(config: AlignConfig, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(ascii=True)
    other = saved(tmp_path / "other", random_llama(tokenizer, context=512), tokenizer)
    with pytest.raises(
        VocabularyMismatch, match=r"has another tokenizer than .*; give a model with the same tokenizer"
    ):
        prepare(replace(config, reference=str(other)))


def test_a_reference_with_another_chat_template_is_refused_unless_both_get_one(
    config: AlignConfig, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant:\n")
    other = saved(tmp_path / "other", random_llama(tokenizer, context=512), tokenizer)
    with pytest.raises(VocabularyMismatch, match=r"has another chat template than .*; give a model with the same one"):
        prepare(replace(config, reference=str(other)))
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    run = prepare(replace(config, reference=str(other), chat_template=str(template)))
    assert [parent.role for parent in run.parents] == ["model before alignment", "reference"]
