"""NEFTune in training: where the noise enters, and that neither passes, layouts nor interruptions change it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.shared import PROMPTS, shared_batch
from tests.train.small import assert_same_bits, settings, some_packs, study_of, weights
from tests.train.test_run import interrupted_in_step, losses
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import STEP, Batch
from potstill.data.packing import collate
from potstill.models.embedding_noise import check_embedding_noise, make_noise
from potstill.models.families.registry import export_model, import_model
from potstill.models.signals import probe_model
from potstill.ops.layout import repeat_prompts
from potstill.train.config import TrainConfig
from potstill.train.lora import add_adapters
from potstill.train.run import read_run_metrics, train
from potstill.train.training_module import TrainingModule


@pytest.fixture
def batch() -> Batch:
    packs = some_packs()
    return collate([packs[i] for i in range(3)])


def noisy(batch: Batch, *, step: int = 0, alpha: float = 5.0) -> dict[str, Tensor]:
    """The batch of a step, with its noise."""
    batch = {**batch, STEP: torch.tensor(step)}
    return {**batch, **make_noise(batch, alpha=alpha, seed=5)}


def test_a_repeated_prompt_has_the_noise_of_the_shared_one() -> None:
    shared = noisy(shared_batch())
    repeated = repeat_prompts(shared)
    length = PROMPTS[0] - 1  # the last token of a prompt begins each answer
    second = int((repeated["documents"][0] == shared["documents"][0, length]).nonzero()[0])
    for name in ("noise.keys", "noise.scales"):
        assert torch.equal(repeated[name][0, second : second + length], shared[name][0, :length])
    assert bool((repeated["noise.scales"] > 0).all())


def read_embeddings(module: TrainingModule, model: nn.Module, batch: Batch) -> Tensor:
    """What the first layer of `model` reads in a forward of the module."""
    inputs: list[Tensor] = []
    get_model = getattr(model, "get_base_model", lambda: model)
    handle = (
        get_model()
        .model.layers[0]
        .register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    module(**batch)
    handle.remove()
    return inputs[0].detach()


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: export_model(import_model(model))])
def test_the_students_embeddings_alone_get_noise_within_the_bound(
    tiny_llama: LlamaForCausalLM, batch: Batch, wrap: Callable[[PreTrainedModel], PreTrainedModel]
) -> None:
    module = TrainingModule(
        wrap(tiny_llama), study_of(tiny_llama).objective, frozen={"teacher": copy.deepcopy(tiny_llama)}
    )
    (teacher,) = module.frozen_models
    plain, moved = (read_embeddings(module, module.student, given) for given in (batch, noisy(batch)))
    length = batch["input_ids"].shape[1]
    lengths = torch.bincount(batch["documents"][0])[batch["documents"][0]]
    bounds = 5 / (lengths * plain.shape[-1]) ** 0.5
    distances = (moved - plain)[0, :length].abs().amax(-1)
    assert (distances <= bounds * (1 + 1e-4)).all()
    assert (distances > 0.7 * bounds).all()
    assert not (moved - plain)[0, length:].any()  # padding up to a round length
    assert torch.equal(*(read_embeddings(module, teacher, given) for given in (batch, noisy(batch))))


def test_adapters_leave_the_noise_as_it_is(tiny_llama: LlamaForCausalLM, batch: Batch) -> None:
    module = study_of(tiny_llama)
    expected = read_embeddings(module, module.student, noisy(batch))
    module = study_of(tiny_llama)
    adapted = TrainingModule(
        add_adapters(module.student, 2), module.objective, frozen=dict(module.frozen_models_by_name)
    )
    assert torch.equal(read_embeddings(adapted, adapted.student, noisy(batch)), expected)


def test_padded_documents_get_the_noise_of_packed_ones(batch: Batch) -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    config.update({"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0})
    model = GPT2LMHeadModel(config)
    module = study_of(model.double().eval())  # type: ignore[arg-type]
    packed_loss = module(**noisy(batch))["loss"]
    probe = probe_model(module.student)
    assert probe.supports_packing
    object.__setattr__(probe, "supports_packing", False)
    torch.testing.assert_close(module(**noisy(batch))["loss"], packed_loss)
    assert float((module(**batch)["loss"] - packed_loss).detach().abs()) > 1e-6


def test_one_pass_trains_under_the_noise_of_four(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.double()
    ends = []
    for micro in (128, 32):
        study = study_of(tiny_llama)
        options = settings(batch_tokens=128, micro_tokens=micro, tokens=2 * 128, neftune=5.0)
        train(study, some_packs(), options, tmp_path / str(micro), show=False)
        ends.append(weights(study))
    for name, whole in ends[0].items():
        torch.testing.assert_close(whole, ends[1][name], rtol=1e-6, atol=1e-9)
    for once, four in zip(losses(tmp_path / "128"), losses(tmp_path / "32"), strict=True):
        assert once == pytest.approx(four, rel=1e-6)


def test_the_noise_changes_with_the_step(tiny_llama: LlamaForCausalLM, batch: Batch) -> None:
    module = study_of(tiny_llama)
    first, again, second = (module(**noisy(batch, step=step))["loss"] for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_noisy_run_resumes_with_the_same_bits(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    def make_module() -> Any:
        module = study_of(tiny_llama)
        student = add_adapters(module.student, rank) if rank else module.student
        return TrainingModule(student, module.objective, frozen=dict(module.frozen_models_by_name))

    straight, again, options = make_module(), make_module(), settings(neftune=5.0)
    train(straight, some_packs(), options, tmp_path / "a", show=False)
    with interrupted_in_step(3, monkeypatch):
        train(make_module(), some_packs(), options, tmp_path / "b", show=False)
    train(again, some_packs(), options, tmp_path / "b", resume=True, show=False)
    assert_same_bits(straight, again)


def test_evaluations_are_without_noise(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    ends = []
    for alpha in (0.0, 5.0):  # too small a rate to move a weight, so that the noise alone could differ
        options = settings(neftune=alpha, learning_rate=1e-30, weight_decay=0.0, tokens=64, eval_every=1)
        folder = tmp_path / str(alpha)
        train(study_of(tiny_llama), some_packs(), options, folder, validation=some_packs(6, seed=4), show=False)
        lines = read_run_metrics(folder)
        ends.append((lines[0]["loss"], next(line["eval_loss"] for line in lines if "eval_loss" in line)))
    (quiet, quiet_eval), (loud, loud_eval) = ends
    assert quiet != loud
    assert quiet_eval == loud_eval


def test_what_has_no_embeddings_of_its_own_is_refused() -> None:
    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModel, match=r"T5ForConditionalGeneration .*omit --neftune"):
        check_embedding_noise(T5ForConditionalGeneration(config))


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_an_alpha_below_zero_or_without_end_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match=r"neftune is .*; it must be at least 0"):
        TrainConfig(neftune=alpha)
