"""Whole training runs on a tiny model: what must not change, and what must survive."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from potstill.core.errors import ArtefactError, TrainingDiverged
from potstill.data.pack import Packs, pack
from potstill.data.tokens import Tokenised
from potstill.objectives.named import Mixture
from potstill.train import run as running
from potstill.train.run import train
from potstill.train.settings import Settings
from potstill.train.study import Study


def some_packs(documents: int = 48) -> Packs:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 30, (documents,), generator=generator).tolist()
    rows = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    return pack([Tokenised(ids, list(ids)) for ids in rows], length=32, seed=1)


def study_of(model: LlamaForCausalLM) -> Study:
    student, teacher = (type(model)(model.config) for _ in range(2))
    student.load_state_dict(model.state_dict())
    teacher.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
    return Study(student, Mixture(cross_entropy=0.5).build(), frozen={"teacher": teacher})


def settings(**changes: object) -> Settings:
    given: dict[str, object] = {"tokens": 6 * 64, "context": 32, "batch_tokens": 64, "micro_tokens": 64, "seed": 5}
    return Settings(**{**given, "learning_rate": 1e-2, "save_every": 3, **changes})  # type: ignore[arg-type]


def weights(study: Study) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in study.student.state_dict().items()}


def test_eight_small_passes_train_as_one_large_one_does(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.double()
    ends = []
    for micro in (256, 32):
        study = study_of(tiny_llama.double())
        study.double()
        changes = settings(batch_tokens=256, micro_tokens=micro, tokens=3 * 256)
        train(study, some_packs(), changes, tmp_path / str(micro), show=False)
        ends.append(weights(study))
    for name, whole in ends[0].items():
        torch.testing.assert_close(whole, ends[1][name], rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(w, tiny_llama.state_dict()[n]) for n, w in ends[0].items())


def test_a_resumed_run_ends_with_the_very_bits_of_one_that_never_stopped(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = study_of(tiny_llama)
    train(straight, some_packs(), settings(), tmp_path / "a", show=False)
    interrupted = study_of(tiny_llama)
    interrupt = running.Interrupt

    class Third(interrupt):  # type: ignore[misc, valid-type]
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(running, "Interrupt", Third)
    cut = train(interrupted, some_packs(), settings(), tmp_path / "b", show=False)
    assert not cut.finished
    assert cut.steps == 3
    monkeypatch.setattr(running, "Interrupt", interrupt)
    again = study_of(tiny_llama)
    done = train(again, some_packs(), settings(), tmp_path / "b", resume=True, show=False)
    assert done.finished
    for name, bits in weights(straight).items():
        assert torch.equal(bits, weights(again)[name]), name
    lines = [[json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    terms = [[(x["step"], x["loss"], x["forward_kl"]) for x in run if "loss" in x] for run in lines]
    assert terms[0] == terms[1]
    assert [step for step, *_ in terms[0]] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    train(study_of(tiny_llama), some_packs(), settings(), tmp_path, show=False)
    newest = tmp_path / "checkpoint-6" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    from potstill.train import checkpoint

    assert checkpoint.latest(tmp_path, study="") == tmp_path / "checkpoint-3"
    with pytest.raises(ArtefactError, match="other settings"):
        checkpoint.latest(tmp_path, study="another run")


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    study = study_of(tiny_llama)
    with torch.no_grad():
        study.student.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingDiverged, match="step 1"):
        train(study, some_packs(), settings(), tmp_path, show=False)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_training_mode_never_reaches_the_teacher(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.config.attention_dropout = 0.5
    study = study_of(tiny_llama)
    (teacher,) = list(study._frozen)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    modes = []
    teacher.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train(study, some_packs(), settings(tokens=128), tmp_path, show=False)
    assert modes
    assert not any(modes)
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not [name for name, _ in study.named_parameters() if "frozen" in name or "teacher" in name]


def test_terms_in_the_log_are_means_over_all_trained_tokens(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = study_of(tiny_llama)
    outcome = train(study, some_packs(), settings(tokens=64, learning_rate=1e-9), tmp_path, show=False)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(0.5 * line["cross_entropy"] + 0.5 * line["forward_kl"], rel=1e-5)
    assert outcome.steps == 1
    assert outcome.tokens == line["tokens"] <= 64
