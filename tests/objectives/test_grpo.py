"""GRPO and its variants: the definition by autograd in value and gradient, and sums that do not depend on passes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.train.rollouts.policies import make_rollout, prompt_batches
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from potstill.core.errors import DataError, UsageError
from potstill.core.types import IGNORE, OLD_LOG_P, SAMPLING_LOG_P, Batch, supervised_positions
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.grpo import GRPO
from potstill.objectives.policy_options import VARIANTS, PolicyOptions
from potstill.train.rollouts.base import split_documents
from potstill.train.training_module import TrainingModule

PASSES = ([0, 3, 5, 7, 8, 9, 10, 11],)


def build(text: str) -> GRPO:
    """The objective that the command line names."""
    objective = ObjectiveConfig.parse(text, cross_entropy=0.0, temperature=1.0).build()
    (part,) = (part for _, part in objective.parts)  # type: ignore[attr-defined]
    assert isinstance(part, GRPO)
    return part


def make_module(objective: GRPO, model: LlamaForCausalLM) -> TrainingModule:
    """The policy, and a reference that differs from it where there is a penalty."""
    reference = type(model)(model.config).double()
    reference.load_state_dict({name: 1.05 * weight for name, weight in model.state_dict().items()})
    frozen = {"reference": reference} if objective.policy.uses_reference else {}
    return TrainingModule(model, objective, frozen=frozen)


def roll_out(objective: GRPO, model: LlamaForCausalLM, *passes: Sequence[int], shared: bool = True) -> list[Batch]:
    """Passes with samples. With several updates the policy that drew them differs by random numbers, so some clip."""
    options = {name: getattr(objective.policy, name) for name in ("temperature", "scale_rewards", "leave_one_out")}
    batches = make_rollout(shared=shared, **options).roll_out(prompt_batches(*passes), model, step=0)
    if objective.policy.updates == 1:
        return batches
    generator = torch.Generator().manual_seed(1)
    return [
        {
            **batch,
            OLD_LOG_P: batch[SAMPLING_LOG_P].double()
            + 0.4 * torch.randn(1, batch["input_ids"].shape[1], generator=generator).double(),
        }
        for batch in batches
    ]


def define(module: TrainingModule, batch: Batch) -> Tensor:
    """The loss over whole documents, one at a time, each divided as its paper says."""
    objective = module.objective
    assert isinstance(objective, GRPO)
    policy, sums, lengths = objective.policy, [], []
    for document in split_documents(batch):
        trained = document.labels != IGNORE
        if not trained.any():
            continue
        log_q, log_p = (
            read_log_p(network, document.input_ids, policy.temperature)[trained[1:]] for network in networks(module)
        )
        advantage = float(document.fields["advantages"])
        old = document.fields[OLD_LOG_P][trained].double() if OLD_LOG_P in document.fields else log_q.detach()
        ratio = (log_q - old).exp()
        clipped = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
        losses = -torch.minimum(ratio * advantage, clipped * advantage)
        losses = losses + policy.kl * ((log_p - log_q).exp() - (log_p - log_q) - 1)
        sums.append(losses.sum())
        lengths.append(len(losses))
    if policy.normalization == "tokens":
        return torch.stack(sums).sum() / sum(lengths)
    if policy.normalization == "constant":
        return torch.stack(sums).mean() / (policy.length or 6)
    return torch.stack([total / length for total, length in zip(sums, lengths, strict=True)]).mean()


def networks(module: TrainingModule) -> list[nn.Module]:
    return [module.student, module.frozen_models_by_name.get("reference", module.student)]


def read_log_p(model: nn.Module, ids: Tensor, temperature: float) -> Tensor:
    logits = model(ids[None], use_cache=False).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def gradients(module: TrainingModule, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


CASES = [
    *(f"grpo:variant={name}" for name in VARIANTS),
    "grpo:updates=2,kl=0.1,temperature=0.7",
    "grpo:variant=dapo,updates=3,temperature=1.3",
]


@pytest.mark.parametrize("text", CASES)
def test_value_and_gradient_are_those_of_the_definition(text: str, tiny_llama: LlamaForCausalLM) -> None:
    objective = build(text)
    module = make_module(objective, tiny_llama.double())
    (batch,) = roll_out(objective, tiny_llama, *PASSES)
    expected = define(module, batch)
    found = module(num_items_in_batch=module.counts(batch), **batch)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-7, atol=1e-9)
    assert_same_gradients(gradients(module, found["loss"]), gradients(module, expected))


@pytest.mark.parametrize("text", ["grpo:updates=2,kl=0.1,temperature=0.7", "grpo:variant=dr_grpo", "grpo:variant=dapo"])
def test_eight_passes_are_one(text: str, tiny_llama: LlamaForCausalLM) -> None:
    objective = build(text)
    module = make_module(objective, tiny_llama.double())
    (whole,) = roll_out(objective, tiny_llama, *PASSES)
    parts = roll_out(objective, tiny_llama, *([number] for number in PASSES[0]))
    if OLD_LOG_P in whole:  # of the same numbers
        ends = torch.tensor([part["input_ids"].shape[1] for part in parts]).cumsum(0).tolist()
        pieces = [
            whole[OLD_LOG_P][:, end - part["input_ids"].shape[1] : end] for part, end in zip(parts, ends, strict=True)
        ]
        parts = [{**part, OLD_LOG_P: piece} for part, piece in zip(parts, pieces, strict=True)]
    counts = torch.stack([module.counts(part) for part in parts]).sum(0)
    assert counts.tolist() == module.counts(whole).tolist()
    expected = gradients(module, module(num_items_in_batch=counts, **whole)["loss"])
    loss = torch.stack([module(num_items_in_batch=counts, **part)["loss"] for part in parts]).sum()
    assert_same_gradients(gradients(module, loss), expected)


def test_what_is_only_measured_is_a_mean_over_tokens(tiny_llama: LlamaForCausalLM) -> None:
    objective = build("grpo:updates=2,kl=0.1,temperature=0.7")
    module = make_module(objective, tiny_llama.double())
    (batch,) = roll_out(objective, tiny_llama, *PASSES)
    positions, targets, documents = supervised_positions(batch)
    found = dict(zip(module.term_names, module(**batch)["sums"] / module.counts(batch), strict=True))
    assert list(found) == ["grpo", "kl", "clipped", "sampling_gap"]
    old, sampling = (batch[name][:, 1:][positions[:, :-1]] for name in (OLD_LOG_P, SAMPLING_LOG_P))
    torch.testing.assert_close(found["sampling_gap"], (old - sampling).abs().mean(), rtol=1e-5, atol=1e-6)
    assert found["kl"] > 0
    advantages = batch["advantages"][documents]
    log_q = torch.cat(
        [read_log_p(tiny_llama, one.input_ids, 0.7)[one.labels[1:] != IGNORE] for one in split_documents(batch)]
    )
    ratio = (log_q - old).exp()
    is_clipped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert 0 < is_clipped.double().mean() < 1
    torch.testing.assert_close(found["clipped"], is_clipped.double().mean())
    assert len(targets) == len(ratio)


def test_decoding_and_training_give_a_token_the_same_probability_at_the_temperature_of_the_sampling(
    tiny_llama: LlamaForCausalLM,
) -> None:
    """Trap: a temperature on one side. Then each ratio of the first update would be far from 1."""
    for text, is_same in (("grpo:temperature=0.6", True), ("grpo", False)):
        objective = build("grpo:temperature=0.6")
        (batch,) = roll_out(objective, tiny_llama, *PASSES)
        module = make_module(build(text), tiny_llama)
        gap = float(module(**batch)["sums"][1] / module.counts(batch)[1])
        assert (gap < 1e-4) is is_same
        assert gap < 1e-4 or gap > 0.1


def test_a_sample_without_an_advantage_has_no_gradient(tiny_llama: LlamaForCausalLM) -> None:
    objective = build("grpo")
    module = make_module(objective, tiny_llama.double())
    (batch,) = roll_out(objective, tiny_llama, *PASSES)
    flat = {**batch, "advantages": torch.zeros_like(batch["advantages"])}
    assert not any(gradient.any() for gradient in gradients(module, module(**flat)["loss"]).values())


def test_each_variant_has_the_values_of_its_paper() -> None:
    grpo, dr_grpo, dapo, rloo = (build(f"grpo:variant={name}").policy for name in VARIANTS)
    assert (grpo.normalization, grpo.scale_rewards, grpo.clip_high) == ("sequences", "group", 0.2)
    assert (dr_grpo.normalization, dr_grpo.scale_rewards, dr_grpo.length) == ("constant", "none", 0)
    assert (dapo.normalization, dapo.clip_low, dapo.clip_high, dapo.overlong) == ("tokens", 0.2, 0.28, "penalize")
    assert (rloo.normalization, rloo.length, rloo.scale_rewards, rloo.leave_one_out) == ("constant", 1, "none", True)
    assert build("grpo:variant=dapo,clip_high=0.5,refills=0").policy == PolicyOptions(
        normalization="tokens", clip_high=0.5, overlong="penalize"
    )


def test_the_reference_is_needed_where_there_is_a_penalty_alone() -> None:
    for text, networks_needed in (("grpo", ()), ("grpo:kl=0.04", ("reference",))):
        config = ObjectiveConfig.parse(text, cross_entropy=0.0, temperature=1.0)
        assert (config.networks, config.data, config.uses_teacher) == (networks_needed, "prompts", False)
        assert config.required_rollout == "grouped"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo:variant=drgrpo", "no variant 'drgrpo'.*dr_grpo"),
        ("grpo:normalization=mean", "normalization is 'mean'.*sequences, tokens, constant"),
        ("grpo:updates=1.5", "updates is 1.5; choose a whole number"),
        ("grpo:updates=0", "updates is 0; choose a number of at least 1"),
        ("grpo:leave_one_out=2", "leave_one_out is 2; choose 0 or 1"),
        ("grpo:temperature=0", "greedy samples would all be the same"),
        ("grpo:clip_low=1", "clip_low is 1; choose a number from 0 to below 1"),
        ("grpo:kl=-1", "kl is -1; choose a number of at least 0"),
    ],
)
def test_a_value_out_of_its_range_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(text)


def test_a_batch_without_advantages_or_without_a_length_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    objective = build("grpo:variant=dr_grpo")
    (batch,) = roll_out(objective, tiny_llama, *PASSES)
    module = make_module(objective, tiny_llama)
    without: dict[str, Any] = {name: values for name, values in batch.items() if name != "advantages"}
    with pytest.raises(DataError, match="no advantages of samples; train grpo on prompts"):
        module(**without)
    with pytest.raises(DataError, match="how long a sample may be; give grpo a length"):
        objective.counts({name: values for name, values in batch.items() if name != "run.max_tokens"})


def test_old_log_probabilities_are_those_of_the_policy_that_drew(tiny_llama: LlamaForCausalLM) -> None:
    text = "updates=2,temperature=0.7,clip_low=1e-5,clip_high=1e-5"  # so that any other ratio than 1 is clipped
    rollout = make_rollout(updates=2, temperature=0.7)
    first = rollout.roll_out(prompt_batches(*PASSES), tiny_llama.double(), step=0)
    (batch,) = rollout.roll_out(prompt_batches(*PASSES), tiny_llama, step=1)
    assert OLD_LOG_P not in first[0]
    module = make_module(build(f"grpo:{text}"), tiny_llama)
    means = dict(zip(module.term_names, module(**batch)["sums"] / module.counts(batch), strict=True))
    assert means["clipped"] == 0
    assert means["sampling_gap"] < 1e-5
