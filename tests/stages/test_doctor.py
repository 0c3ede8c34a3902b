"""The doctor on planted faults, each of which it must find, and on honest pairs, where it must find none."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.stages.world import saved
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.models import signals as reading
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.ops.divergence import DIVERGENCES, reverse_kl
from potstill.ops.row_loss import DivergenceRows
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.checks import perturbation, same_tokenizer
from potstill.stages.checks.inputs import CheckInputs, build_check_inputs
from potstill.stages.checks.report import FAIL, PASS, Check, CheckFailed, raise_if_failed, run_checks
from potstill.stages.dataset import prepare_dataset
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.doctor import Doctor
from potstill.stages.prune import PruneConfig
from potstill.teachers.cached import TeacherCache
from potstill.train.config import TrainConfig

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
ENDS = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
REAL = {"smollm2": ("smollm2", 20), "gemma3": (os.environ.get("POTSTILL_GEMMA", ""), 12)}
STIFFNESS = 5.0
PLACES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}


def made(family: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, **ENDS)).eval()
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, **HEADS, **ENDS, final_logit_softcapping=3.0)).eval()
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HEADS, **ENDS, sliding_window=16)).eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, **PLACES, **ENDS)).eval()


def world(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: Path,
    compute: torch.dtype = torch.float32,
) -> CheckInputs:
    prepared = prepare_dataset(DatasetConfig(data=str(text), context=64), tokenizer, tokens=512, documents=2)
    return build_check_inputs(
        prepared.packs,
        student=student,
        student_tokenizer=tokenizer,
        teacher=teacher,
        teacher_tokenizer=tokenizer,
        vocabulary=259,
        kind="text",
        compute_dtype=compute,
    )


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.outcome == FAIL]


def ill(found: CheckInputs) -> list[str]:
    return failed(list(run_checks(found, same_tokenizer.ALL_CHECKS)))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_an_honest_pair_is_well(
    family: str, compute: torch.dtype, tiny_tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    teacher, student = made(family, 1).to(compute), made(family, 2)
    found = list(run_checks(world(teacher, student, tiny_tokenizer, text, compute), same_tokenizer.ALL_CHECKS))
    assert not failed(found), [check.to_dict() for check in found]
    assert len(found) == 9  # of twelve: no chat, no cache


@pytest.mark.parametrize(("temperature", "compute"), [(1.0, torch.float32), (2.0, torch.bfloat16)])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_an_honest_pair_is_well_under_the_divergence_that_it_is_to_be_trained_with(
    name: str, temperature: float, compute: torch.dtype, tiny_tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    teacher, student = made("gemma2", 1).to(compute), made("gemma2", 2)
    asked = world(teacher, student, tiny_tokenizer, text, compute)
    found = list(
        run_checks(
            replace(asked, logit_objective=ObjectiveConfig(name=name, temperature=temperature).logit_objective),
            same_tokenizer.ALL_CHECKS,
        )
    )
    assert not failed(found), [check.to_dict() for check in found]


def test_a_temperature_that_the_loss_forgets_is_found(
    tiny_tokenizer: PreTrainedTokenizerFast, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = world(made("qwen3", 1), made("qwen3", 2), tiny_tokenizer, text)
    warm = replace(found, logit_objective=ObjectiveConfig(name="jsd", temperature=2.0).logit_objective)
    assert not ill(warm)
    monkeypatch.setattr(
        "potstill.objectives.logit_distillation.DivergenceRows",
        lambda divergence, temperature, teacher: DivergenceRows(divergence, teacher=teacher),
    )
    assert not ill(found)
    assert "loss matches reference" in ill(warm)


def test_what_is_compared_is_the_objectives_own_divergence() -> None:
    inner = ObjectiveConfig(name="dskd", options={"divergence": "reverse_kl"}, temperature=2.0).logit_objective
    assert (inner.divergence, inner.temperature) == (reverse_kl, 2.0)
    assert ObjectiveConfig(name="cross_entropy").logit_objective == LogitDistillation()


@pytest.fixture(scope="module", params=REAL)
def real_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A real model and two thirds of its layers."""
    name, layers = REAL[request.param]
    if not name:
        pytest.skip("POTSTILL_GEMMA names no Gemma 3 270M, as a folder or a .gguf file")
    out = tmp_path_factory.mktemp("real") / "student"
    PruneConfig(model=name, shape={"layers": layers}, layers_by="evenly").run(out)
    return name, out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_and_its_pruned_self_are_well(real_pair: tuple[str, Path], dtype: str) -> None:
    teacher, student = real_pair
    found = Doctor(teacher=teacher, student=str(student), dtype=dtype).run()
    assert not failed(found), [check.to_dict() for check in found]
    assert len(found) == 9


def test_a_permuted_tokenizer_of_equal_width_is_found(
    teacher: Path, text: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    table = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    words = table["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    student = saved(tmp_path / "student", tiny_llama, tiny_tokenizer)
    (student / "tokenizer.json").write_text(json.dumps(table))
    found = Doctor(teacher=str(teacher), student=str(student), data=str(text), context=64).run()
    assert [(one.name, one.outcome) for one in found] == [("shared vocabulary", FAIL)]


def test_a_template_whose_stop_token_is_not_trained_is_found(
    pairs: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_llama.config.max_position_embeddings = 512
    honest = Doctor(teacher=str(saved(tmp_path / "honest", tiny_llama, tiny_tokenizer)), data=str(pairs), context=64)
    assert not failed(honest.run())
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    endless = saved(tmp_path / "endless", tiny_llama, tiny_tokenizer)
    assert failed(replace(honest, teacher=str(endless)).run()) == ["stop token"]


@pytest.mark.parametrize("ending", ["<|im_end|>", "<|im_end|><|endoftext|>"])
def test_a_base_model_is_seen_to_stop_where_its_template_ends_an_answer(
    ending: str,
    pairs: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    tiny_llama.config.max_position_embeddings = 512
    tiny_llama.generation_config.eos_token_id = 0
    tiny_tokenizer.eos_token = "<|endoftext|>"
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace("<|im_end|>", ending)
    base = saved(tmp_path / "base", tiny_llama, tiny_tokenizer)
    checks = {check.name: check for check in Doctor(teacher=str(base), data=str(pairs), context=64).run()}
    assert checks["stop token"].outcome == PASS
    assert checks["stop token"].found == "in 100% of the answers; generation stops at '<|im_end|>'"


def test_a_teacher_that_stays_in_train_mode_is_found(tiny_tokenizer: PreTrainedTokenizerFast, text: Path) -> None:
    teacher, student = made("gpt2", 1), made("gpt2", 2)
    found = world(teacher, student, tiny_tokenizer, text)
    assert not ill(found)  # GPT-2 has dropout, and an eval() that works
    teacher.train()
    teacher.eval = lambda: teacher  # type: ignore[method-assign]
    assert {"deterministic teacher", "loss matches reference"} <= set(ill(found))


def test_padded_vocabularies_are_named_and_a_loss_over_their_padding_is_found(
    tiny_tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    teacher, student = made("qwen3", 1), made("qwen3", 2)
    for model in (teacher, student):
        model.resize_token_embeddings(320, mean_resizing=False)
    found = world(teacher, student, tiny_tokenizer, text)
    assert "259 ids shared; cut to them: student's head of 320 and teacher's head of 320" in {
        check.found for check in run_checks(found, same_tokenizer.QUICK_CHECKS)
    }
    assert not ill(found)
    assert "loss matches reference" in ill(replace(found, vocabulary=320))


def test_an_ignored_soft_cap_is_found(
    tiny_tokenizer: PreTrainedTokenizerFast, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = world(made("gemma2", 1), made("gemma2", 2), tiny_tokenizer, text)
    assert not ill(found)
    whole = reading.get_head
    monkeypatch.setattr(reading, "get_head", lambda model: whole(model)._replace(softcap=None))
    assert {"LM head reproduced", "loss matches reference"} <= set(ill(found))


def test_a_wrong_gradient_of_a_right_loss_is_found(
    tiny_tokenizer: PreTrainedTokenizerFast, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.ops import fused

    found = world(made("qwen3", 1), made("qwen3", 2), tiny_tokenizer, text)
    monkeypatch.setattr(fused, "_differentiate_head", lambda delta, logits, problem: delta.mul_(2))
    assert ill(found) == ["finite differences"]


def test_documents_that_see_each_other_are_found(
    tiny_tokenizer: PreTrainedTokenizerFast, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.models import packed_attention

    found = world(made("qwen3", 1), made("qwen3", 2), tiny_tokenizer, text)
    assert not ill(found)
    monkeypatch.setattr(
        packed_attention, "document_attention", lambda q, k, v, lengths, **more: whole(q, k, v, more["scale"])
    )
    assert {"packing isolation", "loss matches reference"} <= set(ill(found))


def test_a_stiff_model_is_right_at_a_smaller_step_and_a_wrong_gradient_at_none(
    tiny_tokenizer: PreTrainedTokenizerFast, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.ops import fused

    student = made("qwen3", 2)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.q_norm.weight.mul_(STIFFNESS)  # a softmax that a small step turns over
            layer.self_attn.k_norm.weight.mul_(STIFFNESS)
    found = world(made("qwen3", 1), student, tiny_tokenizer, text)
    monkeypatch.setattr(perturbation, "STEP_SHRINKAGES", (1.0,))
    assert perturbation.check_finite_differences(found).outcome == FAIL
    monkeypatch.undo()
    assert perturbation.check_finite_differences(found).outcome == "pass"
    monkeypatch.setattr(fused, "_differentiate_head", lambda delta, logits, problem: delta.mul_(1.2))
    assert perturbation.check_finite_differences(found).outcome == FAIL


def test_a_teacher_that_sees_the_next_token_is_refused(
    text: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=4, initializer_range=0.2, pad_token_id=2)
    teacher = str(saved(tmp_path / "bert", BertLMHeadModel(config), tiny_tokenizer))
    config = Qwen3Config(**SIZES, **HEADS, **ENDS)
    student = str(saved(tmp_path / "qwen", Qwen3ForCausalLM(config), tiny_tokenizer))
    refused = pytest.raises(UnsupportedModel, match=r"the teacher .*bert is not causal")
    with refused:
        Doctor(teacher=teacher, student=student, data=str(text), context=64).run()
    with refused:
        CacheTeacherConfig(teacher=teacher, data=str(text), context=64).run(tmp_path / "cache", show=False)
    settings = TrainConfig(tokens=512, context=64, batch_tokens=128, micro_tokens=64)
    with refused:
        distill(
            DistillConfig(teacher=teacher, student=student, data=str(text), settings=settings),
            tmp_path / "out",
            show=False,
        )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def test_a_cache_of_another_teacher_is_found(
    teacher: Path, text: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    CacheTeacherConfig(teacher=str(teacher), data=str(text), context=64, top_k=8, dtype="float32").run(
        tmp_path / "c", show=False
    )
    doctor = Doctor(
        teacher=str(teacher), data=str(text), context=64, teacher_cache=str(tmp_path / "c"), dtype="float32"
    )
    assert not failed(doctor.run())
    with torch.no_grad():
        tiny_llama.model.norm.weight.mul_(1.5)
    other = saved(tmp_path / "other", tiny_llama, tiny_tokenizer)
    assert failed(replace(doctor, teacher=str(other)).run()) == ["cache matches teacher"]


@pytest.mark.parametrize("sampled", [0, 4])
def test_hidden_states_of_another_teacher_are_found(
    sampled: int, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = CacheTeacherConfig(
        teacher=str(teacher), data=str(text), context=64, top_k=8, dtype="float32", sampled=sampled
    )
    replace(stage, hidden=True).run(tmp_path / "c", show=False)
    doctor = Doctor(
        teacher=str(teacher), data=str(text), context=64, teacher_cache=str(tmp_path / "c"), dtype="float32"
    )
    assert "cache matches teacher" in {check.name for check in doctor.run()}
    assert not failed(doctor.run())
    kept = TeacherCache.hidden_states
    monkeypatch.setattr(TeacherCache, "hidden_states", lambda cache, batch: kept(cache, batch).flip(0))
    assert failed(doctor.run()) == ["cache matches teacher"]


def test_what_fails_stops_a_run_with_what_to_do_and_what_passes_goes_into_its_card() -> None:
    good = Check(name="a", outcome="pass", found="equal", why="it matters")
    assert raise_if_failed([good]) == [{"name": "a", "outcome": "pass: equal"}]
    with pytest.raises(CheckFailed, match="b: apart; fix it"):
        raise_if_failed([good, Check(name="b", outcome=FAIL, found="apart", why="it matters", remedy="fix it")])


def test_each_of_several_teachers_has_checks_of_its_own(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, pairs: Path, tmp_path: Path
) -> None:
    teacher = saved(tmp_path / "teacher", tiny_llama, tiny_tokenizer)
    doctor = Doctor(teacher=(f"one={teacher}", f"two={teacher}"), data=str(pairs), context=64)
    names = [check.name for check in doctor.run()]
    assert {"shared vocabulary (one)", "shared vocabulary (two)"} <= set(names)
    assert sum(name.endswith("(one)") for name in names) == sum(name.endswith("(two)") for name in names)
    with pytest.raises(UsageError, match="give one of them"):
        replace(doctor, teacher_cache="somewhere").run()
