"""Objectives as values: one with a share of cross-entropy, a sum of weighted ones, or one of a user's file."""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tests.objectives.test_invariants import batch_of, gradients, other
from transformers import LlamaForCausalLM

from potstill.core.errors import NotFound, UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.multi_teacher import TeacherEnsemble
from potstill.ops.divergence import forward_kl
from potstill.train.training_module import TrainingModule

MY_KL = """
import torch

from potstill.ops.divergence import declare_facts


def my_kl(teacher, student, scale=1.0):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return scale * (log_p.exp() * (log_p - log_q)).sum(-1)


@declare_facts(is_f_divergence=True)
def my_f(teacher, student):
    return my_kl(teacher, student)


def mixing(teacher, student):
    return my_kl(teacher, student) - my_kl(teacher, student).mean()


def shapeless(teacher, student):
    return my_kl(teacher, student).sum()


def constant(teacher, student):
    return my_kl(teacher, student.detach())


def failing(teacher, student):
    raise KeyError("nothing")


def greedy(teacher, student, targets):
    return my_kl(teacher, student)


def nonzero(teacher, student):
    return my_kl(teacher, student) + 1


class Norm:
    uses_teacher, needs_teacher_model, supports_cross_tokenizer, additive = False, False, True, False
    weights = {"norm": 1.0}

    def __init__(self, power=2.0):
        self.power = power

    def needs(self, batch):
        from potstill.objectives.cross_entropy import CrossEntropy

        return CrossEntropy().needs(batch)

    def counts(self, batch):
        return {"norm": 1}

    def __call__(self, views, frozen, batch):
        return {"norm": views["student"].rows.abs().pow(self.power).mean()}


class Nothing:
    needs_teacher_model = False
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(MY_KL)
    return path


def parse(text: str, share: float = 0.7) -> ObjectiveConfig:
    return ObjectiveConfig.parse(text, cross_entropy=share, temperature=1.0)


def test_a_named_objective_is_the_same_plain_data_as_ever() -> None:
    assert asdict(parse("jsd:beta=0.3")) == {
        "name": "jsd",
        "cross_entropy": 0.7,
        "temperature": 1.0,
        "options": {"beta": 0.3},
    }
    assert asdict(parse("cross_entropy"))["options"] == {}


@pytest.mark.parametrize(
    ("text", "weights", "share"),
    [
        ("0.5*forward_kl + 0.5*reverse_kl", {"forward_kl": 0.5, "reverse_kl": 0.5}, 0.0),
        ("0.6*cross_entropy+0.2*jsd:beta=0.3", {"cross_entropy": 0.6, "jsd": 0.2}, 0.75),
        ("cross_entropy+1e-2*total_variation", {"cross_entropy": 1.0, "total_variation": 0.01}, 1 / 1.01),
        ("2*balance:k=2+1*cross_entropy", {"balance": 2.0, "cross_entropy": 1.0}, 1 / 3),
    ],
)
def test_a_sum_states_the_whole_loss_and_reads_back(text: str, weights: dict[str, float], share: float) -> None:
    summed = parse(text)
    assert summed.build().weights == weights
    assert summed.cross_entropy == pytest.approx(share)
    plain = json.loads(json.dumps(asdict(summed)))
    assert ObjectiveConfig(**plain) == summed
    assert parse(summed.name, summed.cross_entropy) == summed
    assert summed.uses_teacher == ("balance" not in text)


def test_a_sum_knows_what_its_terms_need() -> None:
    summed = parse("0.5*forward_kl+0.5*hidden:map=2-6/12-30")
    assert summed.needs_teacher_model
    assert not summed.needs_only_last_hidden
    assert not summed.supports_cross_tokenizer
    assert parse("0.5*forward_kl+0.5*tie_kd:k=3").needs_only_last_hidden
    assert parse("0.5*uld+0.5*mined").supports_cross_tokenizer
    assert parse("0.5*uld+0.5*mined").needs_edit_alignment
    assert parse("minillm+0.1*cross_entropy").required_rollout == "minillm"
    assert summed.logit_objective.divergence is forward_kl
    assert parse("dskd+0.1*jsd:beta=0.2").logit_objective.name == "jsd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half*forward_kl", "there is no objective 'half.forward_kl'"),
        ("0.5*forward_kl+x*reverse_kl", "'x.reverse_kl' is not WEIGHT.OBJECTIVE"),
        ("0.5*forward_kl+0.5*nothing", "there is no objective 'nothing'"),
        ("0.5*forward_kl+0.5*jsd:alpha=1", "jsd has no option 'alpha'"),
        ("0.5*jsd:beta=0.1+0.5*jsd:beta=0.9", "has two terms 'jsd'"),
        ("0*forward_kl+0*reverse_kl", "weights of 0 or more"),
        ("-1*forward_kl+2*reverse_kl", "weights of 0 or more"),
    ],
)
def test_a_wrong_sum_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_a_share_beside_a_sum_is_refused() -> None:
    with pytest.raises(UsageError, match="states every weight and option itself; omit --cross-entropy"):
        parse("0.5*forward_kl+0.5*reverse_kl", share=0.3)


def test_only_some_divergences_learn_from_partial_distributions() -> None:
    assert parse("forward_kl").supports_sampled_tokens
    assert not parse("reverse_kl").supports_sampled_tokens
    assert parse("reverse_kl").supports_partial_distributions
    assert not parse("adaptive_kl:tail=0.2").supports_partial_distributions
    assert not parse("0.5*forward_kl+0.5*adaptive_kl").supports_partial_distributions


def test_a_divergence_of_a_file_trains_as_the_same_one_of_potstill(file: Path, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    teacher, batch = other(tiny_llama), batch_of(9, 5)
    mine, same = (
        TrainingModule(tiny_llama, parse(text).build(), frozen={"teacher": teacher})
        for text in (f"{file}:my_kl:scale=2", "forward_kl")
    )
    assert mine.term_names == ["cross_entropy", "my_kl"]
    torch.testing.assert_close(mine(**batch)["sums"][1], 2 * same(**batch)["sums"][1])
    both = parse(f"0.5*{file}:my_kl:scale=2+0.5*jsd")
    assert both.build().weights == {"my_kl": 0.5, "jsd": 0.5}
    assert gradients(TrainingModule(tiny_llama, both.build(), frozen={"teacher": teacher}), batch)


def test_a_card_holds_the_digest_of_a_file_and_refuses_another_content(file: Path) -> None:
    config = parse(f"{file}:my_kl")
    digest = sha256(file.read_bytes()).hexdigest()
    assert config.options == {"sha256": digest}
    assert config.name == f"{file}:my_kl"
    assert parse(f"{file}:my_kl:sha256={digest}") == config == ObjectiveConfig(**asdict(config))
    summed = parse(f"0.5*{file}:my_kl+0.5*jsd")
    assert f"sha256={digest}" in summed.name
    file.write_text(MY_KL + "\n")
    for changed in (config, summed):
        with pytest.raises(UsageError, match="restore the file"):
            ObjectiveConfig(**asdict(changed))


def test_a_divergence_of_a_file_claims_nothing_that_it_does_not_declare(file: Path) -> None:
    assert not parse(f"{file}:my_kl").supports_partial_distributions
    assert parse(f"{file}:my_f").supports_partial_distributions
    assert not parse(f"{file}:my_f").needs_teacher_model
    ensemble = TeacherEnsemble(("a", "b"), "average")
    assert len(parse(f"{file}:my_kl", 0.0).build(ensemble=ensemble).weights) == 2


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("absent", "defines no function or class 'absent'; it defines my_kl"),
        ("mixing", "mixes rows"),
        ("shapeless", "one finite number for each row"),
        ("constant", "no finite gradient|fails on small logits"),
        ("failing", "fails on small logits: KeyError"),
        ("greedy", "requires 3 arguments"),
        ("my_kl:beta=1", "has no option 'beta'; it has scale"),
    ],
)
def test_what_is_no_divergence_is_refused(symbol: str, message: str, file: Path) -> None:
    with pytest.raises(UsageError, match=message):
        parse(f"{file}:{symbol}")


def test_a_file_that_is_not_there_or_does_not_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no readable file"):
        parse(f"{tmp_path}/none.py:my_kl")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="does not run: ZeroDivisionError"):
        parse(f"{tmp_path}/broken.py:my_kl")


def test_a_divergence_that_is_not_zero_for_equal_logits_is_warned_of(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parse(f"{file}:nonzero")
    shown = capsys.readouterr().err
    assert shown.startswith("warning: ")
    assert "its minimum is not the teacher" in shown


def test_a_class_of_a_file_is_an_objective(file: Path, tiny_llama: LlamaForCausalLM) -> None:
    config = parse(f"0.9*cross_entropy+0.1*{file}:Norm:power=1")
    assert not config.uses_teacher
    module = TrainingModule(tiny_llama, config.build())
    assert module.term_names == ["cross_entropy", "norm"]
    assert gradients(module, batch_of(9, 5))
    with pytest.raises(UsageError, match="is no objective; give its class additive"):
        parse(f"{file}:Nothing", 0.0).build()
