"""What is counted beside what is there: torch's own counter, tensors' bytes, files' bytes."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.small import some_packs, study_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from potstill.core.blueprint import Blueprint
from potstill.data.packing import Packs, collate
from potstill.data.windows import WindowCounts
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model, read_blueprint
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.resources.activation_memory import PROBE_TOKENS, _count_saved_bytes, measure_autograd_bytes
from potstill.stages.resources.dataset_stats import PackingStats, compute_packing_stats
from potstill.stages.resources.estimate import measure_tokenizer_bytes
from potstill.stages.resources.workload import Workload
from potstill.train.activation_checkpointing import activation_checkpointing
from potstill.train.config import TrainConfig
from potstill.train.lora import add_adapters
from potstill.train.optimizer import parameter_groups
from potstill.train.run import train
from potstill.train.selection import select_parameters

SETTINGS = TrainConfig(tokens=4096, context=64, batch_tokens=256, micro_tokens=128)


@pytest.fixture
def blueprint(tiny_llama: LlamaForCausalLM) -> Blueprint:
    return read_blueprint(tiny_llama.config)


@pytest.fixture
def work(blueprint: Blueprint) -> Workload:
    text = PackingStats(fill=1.0, trained=0.5, seen=16.0)
    return Workload(
        teacher=blueprint, student=blueprint, vocabulary=259, settings=SETTINGS, packing=text, compute_bytes=4
    )


def test_texture_counts_what_each_token_sees() -> None:
    ids = np.arange(5, dtype=np.int32)
    labels = np.array([-100, 1, 2, -100, 4], dtype=np.int32)
    two = np.array([0, 5], dtype=np.int64)
    packs = Packs(
        ids, labels, np.array([3, 2], dtype=np.int32), two, np.array([0, 2], dtype=np.int64), 10, WindowCounts(10)
    )
    assert compute_packing_stats(packs) == PackingStats(fill=0.5, trained=0.6, seen=(1 + 2 + 3 + 1 + 2) / 5)


def test_a_pass_and_a_step_by_hand(work: Workload) -> None:
    assert (work.tokens, work.rows, work.passes) == (128.0, 64.0, 2)
    blocks = 2 * 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    attention, head = 4 * 3 * 32 * 16.0, 2 * 259 * 32 * 0.5
    assert work.flops() == {
        "teacher forward": blocks + attention,
        "student forward": blocks + attention,
        "backward": 2 * blocks + 2.5 * attention,
        "head and loss": 4 * head,
    }
    assert replace(work, source="alone").flops()["head and loss"] == 3 * head
    assert replace(work, source="cached").flops()["teacher forward"] == 0
    assert replace(work, lora=2).flops()["backward"] == blocks + 2.5 * attention
    assert replace(work, train="mlp").flops()["backward"] < 2 * blocks + 2.5 * attention


@pytest.mark.parametrize("source", ["live", "alone"])
def test_the_operations_of_a_step_are_those_that_torch_counts(tiny_llama: LlamaForCausalLM, source: str) -> None:
    """All but attention, which torch's counter does not see on a CPU, and one product of the head, written in place."""
    packs = some_packs()
    study = study_of(
        tiny_llama, objective=ObjectiveConfig(name="forward_kl" if source == "live" else "cross_entropy").build()
    )
    blueprint, text = read_blueprint(tiny_llama.config), compute_packing_stats(packs)
    work = Workload(
        teacher=blueprint, student=blueprint, vocabulary=259, settings=SETTINGS, packing=text, source=source
    )
    with FlopCounterMode(display=False) as counter:
        study(**collate([packs[i] for i in range(len(packs))]))["loss"].backward()
    found = counter.get_total_flops() + work.count_forward_flops(blueprint).head * packs.num_tokens
    attention = work.count_forward_flops(blueprint).attention
    counted = sum(work.flops().values()) - attention * (1 + 2.5 + (source == "live"))
    assert found / packs.num_tokens == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("lora", [0, 2])
def test_weights_gradients_and_moments_are_the_bytes_of_their_tensors(
    work: Workload, tiny_llama: LlamaForCausalLM, lora: int
) -> None:
    model = add_adapters(tiny_llama, lora) if lora else tiny_llama
    optimiser = torch.optim.AdamW(parameter_groups(model, None, rate=1e-3, weight_decay=0.01))
    model(torch.arange(20)[None]).logits.sum().backward()
    optimiser.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [t for state in optimiser.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    held = replace(work, lora=lora).memory_bytes(measure_autograd_bytes(work.student, dtype=torch.float32, lora=lora))
    assert held["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert held["optimizer"] == sum(t.nbytes for t in moments)
    assert (
        held["teacher"]
        == held["weights"]
        == 4 * sum(p.numel() for p in model.parameters())
        - 4 * lora * sum(sum(m.shape) for n, m in tiny_llama.named_parameters() if n.endswith("base_layer.weight"))
    )


@pytest.mark.parametrize("pattern", ["mlp", "lm_head|norm", "embed"])
def test_trained_parameters_are_those_that_the_pattern_selects(
    work: Workload, tiny_llama: LlamaForCausalLM, pattern: str
) -> None:
    select_parameters(tiny_llama, pattern)
    num_trained = sum(p.numel() for p in tiny_llama.parameters() if p.requires_grad)
    assert replace(work, train=pattern).trained_parameters == num_trained > 0


def test_a_cached_teacher_takes_no_memory_and_a_silent_one_does(work: Workload) -> None:
    saved = measure_autograd_bytes(work.student, dtype=torch.float32)
    parts = {source: replace(work, source=source).memory_bytes(saved) for source in ("live", "alone", "cached")}
    assert parts["cached"]["teacher"] == 0 < parts["alone"]["teacher"] == parts["live"]["teacher"]
    assert parts["alone"]["logits"] == parts["live"]["logits"] / 2


def test_a_teacher_of_kept_hidden_states_has_a_head_and_no_body(work: Workload) -> None:
    saved = measure_autograd_bytes(work.student, dtype=torch.float32)
    work = replace(work, objective=ObjectiveConfig(name="dskd"))
    live, cached = work, replace(work, source="cached")
    assert cached.flops()["head and loss"] == live.flops()["head and loss"]
    assert cached.flops()["teacher forward"] == 0
    assert cached.memory_bytes(saved)["teacher"] == work.compute_bytes * 259 * 32
    assert cached.memory_bytes(saved)["logits"] == live.memory_bytes(saved)["logits"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_of_one_pass_has_no_gradient_to_add_to(work: Workload, tied: bool) -> None:
    saved = measure_autograd_bytes(work.student, dtype=torch.float32)
    student = replace(work.student, tied=tied)
    several, one = (
        replace(work, student=student, settings=replace(work.settings, micro_tokens=tokens)).memory_bytes(saved)["head"]
        for tokens in (work.settings.batch_tokens // 2, work.settings.batch_tokens)
    )
    assert several - one == (1 if tied else 2) * 4 * work.vocabulary * work.student.hidden


def test_nothing_is_left_of_the_passes_that_tell_what_autograd_saves(work: Workload) -> None:
    def alive_after_measurement(hidden: int) -> int:
        measure_autograd_bytes(replace(work.student, hidden=hidden), dtype=torch.bfloat16)
        gc.collect()
        return sum(type(one) in (Tensor, torch.nn.Parameter) for one in gc.get_objects())

    assert alive_after_measurement(8) == alive_after_measurement(16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_saves_is_linear_in_tokens_and_layers(work: Workload, dtype: torch.dtype) -> None:
    """Held against the whole student of three layers at 96 tokens, which none of the four probes has."""
    saved, tokens = measure_autograd_bytes(work.student, dtype=dtype), 96
    small = replace(work.student, vocabulary=PROBE_TOKENS[0])
    found = _count_saved_bytes(export_model(Backbone(small)).train(), tokens, dtype)
    layers = len(work.student.layers)
    counted = tokens * (layers * saved.per_token_layer + saved.per_token) + layers * saved.per_layer
    assert counted == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_computed_twice_keep_their_inputs_and_one_block(work: Workload, dtype: torch.dtype) -> None:
    """Held against what autograd saves in a forward: all but the one block, and the angles, that are kept elsewhere."""
    saved, twice = measure_autograd_bytes(work.student, dtype=dtype), replace(SETTINGS, checkpoint_activations=True)
    small = export_model(Backbone(replace(work.student, vocabulary=PROBE_TOKENS[0]))).train()
    with activation_checkpointing(small):
        found = _count_saved_bytes(small, int(work.tokens), dtype)
    block, angles = work.tokens * saved.per_token_layer + saved.per_layer, 2 * work.tokens * 8 * 4
    assert replace(work, settings=twice).activation_bytes(saved) - block - angles == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_disk_is_that_of_a_real_run(teacher: Path, text: Path, tmp_path: Path, lora: int) -> None:
    settings = TrainConfig(tokens=512, context=64, batch_tokens=128, micro_tokens=64, save_every=1)
    stage = DistillConfig(
        teacher=str(teacher),
        student=str(teacher),
        data=str(text),
        settings=settings,
        dtype="float32",
        documents=2,
        lora=lora,
    )
    run = distill(stage, tmp_path / "made", show=False)
    blueprint = read_blueprint(run.model.config)
    work = Workload(
        teacher=blueprint,
        student=blueprint,
        vocabulary=259,
        settings=settings,
        packing=PackingStats(1.0, 1.0, 8.0),
        lora=lora,
    )
    found = sum(file.stat().st_size for file in run.out.iterdir())
    disk = work.disk_bytes(measure_tokenizer_bytes(run.tokenizer))
    assert disk["final"] == pytest.approx(found, abs=150_000)  # the papers of so small a run outweigh its weights
    assert disk["most"] == max(3 * disk["checkpoint"], 2 * disk["checkpoint"] + disk["final"])


def test_a_checkpoint_is_as_large_as_it_is_said(tiny_llama: LlamaForCausalLM, work: Workload, tmp_path: Path) -> None:
    train(
        study_of(tiny_llama),
        some_packs(),
        replace(SETTINGS, tokens=1024, context=32, save_every=1),
        tmp_path,
        show=False,
    )
    (folder, *_) = sorted(tmp_path.glob("checkpoint-*"))
    found = sum(file.stat().st_size for file in folder.iterdir())
    assert work.disk_bytes(0)["checkpoint"] == pytest.approx(found, abs=10_000)
