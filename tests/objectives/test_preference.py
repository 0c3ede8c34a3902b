"""Objectives of whole answers: value, metrics and every gradient beside the plain definition, for any chunk."""

import copy
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from tests.objectives.enumerated import ALIGNED
from tests.objectives.test_every_gradient import Small
from tests.objectives.test_invariants import assert_equal, gradients, other
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM

from potstill.core.errors import DataError, UsageError
from potstill.core.types import (
    BASELINE,
    CHOSEN,
    IGNORE,
    REJECTED,
    Batch,
    Objective,
    Signals,
    supervised_positions,
)
from potstill.data.packing import collate
from potstill.data.preferences import batch_of
from potstill.objectives.config import ObjectiveConfig
from potstill.ops import fused
from potstill.stages.distill.config import DistillConfig
from potstill.train.lora import add_adapters
from potstill.train.training_module import TrainingModule

IDS, PROMPT = 7, 2
LENGTHS = ((6, 4), (3, 9), (5, 5))  # of both documents of each pair, prompts included
PAIR_LOSSES = ("dpo", "dpo:smoothing=0.2,nll=0.3,beta=0.5", "dpo:swap=1", "ipo", "simpo:nll=1", "orpo")
LABEL_LOSSES = ("kto", "kto:beta=0.7,weight=2")


def document(length: int, generator: torch.Generator, *, ids: int = IDS) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(3, ids, (length,), generator=generator)
    return tokens, torch.where(torch.arange(length) < PROMPT, IGNORE, tokens)


def pack_of(
    documents: Sequence[tuple[Tensor, Tensor]], sides: Sequence[int], groups: Sequence[int]
) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([tokens for tokens, _ in documents]),
        "labels": torch.cat([labels for _, labels in documents]),
        "lengths": torch.tensor([len(tokens) for tokens, _ in documents]),
        "sides": torch.tensor(sides),
        "groups": torch.tensor(groups),
    }


def pair_packs(lengths: Sequence[Sequence[int]] = LENGTHS, *, ids: int = IDS) -> list[dict[str, Tensor]]:
    """A pack for each pair; the second has its rejected side first."""
    generator = torch.Generator().manual_seed(0)
    orders = [(REJECTED, CHOSEN) if number == 1 else (CHOSEN, REJECTED) for number in range(len(lengths))]
    return [
        pack_of([document(n, generator, ids=ids) for n in both], order, [0, 0])
        for both, order in zip(lengths, orders, strict=True)
    ]


def label_packs() -> list[dict[str, Tensor]]:
    """A group of two answers and two baselines, a group of one each, an answer without a group, and one without z."""
    generator = torch.Generator().manual_seed(1)
    forms = [
        ((CHOSEN, BASELINE, REJECTED, BASELINE), (0, 0, 0, 0)),
        ((BASELINE, REJECTED), (0, 0)),
        ((CHOSEN, REJECTED), (-1, 0)),
    ]
    return [
        pack_of([document(3 + 2 * n, generator) for n in range(len(sides))], sides, groups) for sides, groups in forms
    ]


def packs_for(name: str) -> list[dict[str, Tensor]]:
    return label_packs() if name.startswith("kto") else pair_packs()


def build(name: str) -> Objective:
    return ObjectiveConfig.parse(name, cross_entropy=0.7, temperature=1.0).build()


def networks() -> tuple[Small, Small]:
    return Small(IDS, 5, seed=1, scale=0.5), Small(IDS, 6, seed=2, scale=0.8)


def log_probs(network: Small, batch: Batch) -> Tensor:
    """log pi(answer | prompt) of each document [D], from all logits at once."""
    signals = network.read(batch)
    _, targets, documents = supervised_positions(batch)
    log_p = signals.logits(signals.rows).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return torch.stack([log_p[documents == number].sum() for number in range(len(batch["sides"]))])


# the definitions


def literal_pairs(policy: Tensor, reference: Tensor, tokens: Tensor, batch: Batch, name: str) -> dict[str, Tensor]:
    """The loss and the metrics summed over pairs, in the formulas of the papers."""
    terms: dict[str, list[Tensor]] = {}
    for c, r in batch["pairs"].T.tolist():
        c, r = (r, c) if "swap=1" in name else (c, r)
        ratio, length = policy - reference, tokens
        mean = policy / length
        if name.startswith("ipo"):
            margin = ratio[c] / length[c] - ratio[r] / length[r]
            loss = (margin - 5) ** 2
        elif name.startswith("simpo"):
            margin = 2 * (mean[c] - mean[r])
            loss = -torch.log(torch.sigmoid(margin - 1)) - mean[c]
        elif name.startswith("orpo"):
            odds = mean.exp() / (1 - mean.exp())
            margin = torch.log(odds[c] / odds[r])
            loss = -mean[c] - 0.1 * torch.log(torch.sigmoid(margin))
        elif "smoothing" in name:
            margin = 0.5 * (ratio[c] - ratio[r])
            loss = -0.8 * logsigmoid(margin) - 0.2 * logsigmoid(-margin) - 0.3 * mean[c]
        else:
            margin = 0.1 * (ratio[c] - ratio[r])
            loss = -logsigmoid(margin)
        values = {
            name.partition(":")[0]: loss,
            "margin": margin,
            "accuracy": (margin > 0).double(),
            "chosen_log_p": policy[c],
            "rejected_log_p": policy[r],
            "chosen_tokens": length[c],
            "rejected_tokens": length[r],
            "kl": (ratio[c] + ratio[r]) / 2,
        }
        for key, value in values.items():
            if key != "kl" or name.partition(":")[0] in ("dpo", "ipo"):
                terms.setdefault(key, []).append(value)
    return {key: torch.stack(values).sum() for key, values in terms.items()}


def literal_labels(policy: Tensor, reference: Tensor, tokens: Tensor, batch: Batch, name: str) -> dict[str, Tensor]:
    """The same of answers with a label."""
    beta, weight = (0.7, 2.0) if "weight" in name else (0.1, 1.0)
    sums = dict.fromkeys(("kto", "margin", "accuracy", "kl", "baseline", *SIDES), torch.zeros(()))
    ratio, sides, groups = policy - reference, batch["sides"].tolist(), batch["groups"].tolist()
    for d, side in enumerate(sides):
        if side not in (CHOSEN, REJECTED):
            continue
        mates = [e for e in range(len(sides)) if sides[e] == BASELINE and groups[e] == groups[d] >= 0]
        z = torch.stack([ratio[e].detach() for e in mates]).mean().clamp(min=0) if mates else torch.zeros(())
        margin = beta * (ratio[d] - z) * (1 if side == CHOSEN else -1)
        prefix = "chosen" if side == CHOSEN else "rejected"
        values = {
            "kto": (1 if side == CHOSEN else weight) * (1 - torch.sigmoid(margin)),
            "margin": margin,
            "accuracy": (margin > 0).double(),
            "kl": ratio[d],
            "baseline": z,
            f"{prefix}_log_p": policy[d],
            f"{prefix}_tokens": tokens[d],
        }
        sums |= {key: sums[key] + value for key, value in values.items()}
    return sums


SIDES = ("chosen_log_p", "rejected_log_p", "chosen_tokens", "rejected_tokens")


def literal(policy: Small, reference: Small, batch: Batch, name: str) -> dict[str, Tensor]:
    tokens = torch.bincount(supervised_positions(batch)[2], minlength=len(batch["sides"])).double()
    form = literal_labels if name.startswith("kto") else literal_pairs
    return form(log_probs(policy, batch), log_probs(reference, batch).detach(), tokens, batch, name)


def run(name: str, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The terms, and the gradient of the loss by every weight of the policy."""
    policy, reference = networks()
    objective = build(name)
    with torch.no_grad():
        frozen = {"reference": reference.read(batch)} if "reference" in objective.needs(batch) else {}
    terms = objective({"student": policy.read(batch)}, frozen, batch)
    return dict(terms), differentiate(sum_terms(objective, terms), policy)


def sum_terms(objective: Objective, terms: Mapping[str, Tensor]) -> Tensor:
    return sum((weight * terms[name] for name, weight in objective.weights.items()), torch.zeros(()))


def differentiate(loss: Tensor, policy: Small) -> list[Tensor]:
    weights = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]


@pytest.mark.parametrize("chunk", [1, 3, 7, 200])
@pytest.mark.parametrize("name", [*PAIR_LOSSES, *LABEL_LOSSES])
def test_value_metrics_and_every_gradient_are_those_of_the_definition(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "rows_per_chunk", lambda vocabulary: chunk)
    batch, (policy, reference) = collate(packs_for(name)), networks()
    expected = literal(policy, reference, batch, name)
    terms, gradients = run(name, batch)
    assert terms.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(terms[key], value.detach(), rtol=1e-9, atol=1e-11, check_dtype=False)
    loss = expected[name.partition(":")[0]]
    for a, b in zip(gradients, differentiate(loss, policy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", [*PAIR_LOSSES, *LABEL_LOSSES])
def test_passes_of_one_group_each_sum_to_one_pass(name: str) -> None:
    packs, objective = packs_for(name), build(name)
    whole = run(name, collate(packs))
    parts = [run(name, collate([pack])) for pack in packs]
    for key, value in whole[0].items():
        torch.testing.assert_close(value, torch.stack([terms[key] for terms, _ in parts]).sum(), rtol=1e-9, atol=1e-11)
    for n, gradient in enumerate(whole[1]):
        torch.testing.assert_close(gradient, sum(found[n] for _, found in parts), rtol=1e-8, atol=1e-11)
    counts = objective.counts(collate(packs))
    assert counts == {key: sum(objective.counts(collate([pack]))[key] for pack in packs) for key in counts}
    assert objective.additive


def test_counts_are_pairs_or_answers_with_a_label() -> None:
    assert set(build("dpo").counts(collate(pair_packs())).values()) == {3}
    counts = build("kto").counts(collate(label_packs()))
    assert counts["kto"] == counts["margin"] == 5
    assert (counts["chosen_log_p"], counts["rejected_tokens"]) == (2, 3)


def test_sides_that_change_places_are_reverse_dpo() -> None:
    packs = pair_packs()
    turned = [{**pack, "sides": 1 - pack["sides"]} for pack in packs]
    terms, gradients = run("dpo:swap=1", collate(packs))
    others = run("dpo", collate(turned))
    torch.testing.assert_close(terms, others[0])
    assert all(map(torch.allclose, gradients, others[1]))


def test_a_tie_counts_one_half() -> None:
    policy, _ = networks()
    batch = collate(pair_packs())
    with torch.no_grad():
        frozen = {"reference": policy.read(batch)}
    terms = build("dpo")({"student": policy.read(batch)}, frozen, batch)
    assert terms["accuracy"].item() == 1.5
    assert terms["margin"].item() == terms["kl"].item() == 0
    assert terms["dpo"].item() == pytest.approx(3 * math.log(2), rel=1e-15)


def test_a_baseline_has_no_gradient() -> None:
    pack = label_packs()[1]
    batch = collate([pack])
    policy, reference = networks()
    signals = policy.read(batch)
    rows = signals.rows.detach().requires_grad_()
    student = Signals(rows, signals.logits, signals.head)
    terms = build("kto")({"student": student}, {"reference": reference.read(batch)}, batch)
    (gradient,) = torch.autograd.grad(terms["kto"], rows)
    is_baseline = batch["sides"][supervised_positions(batch)[2]] == BASELINE
    assert not gradient[is_baseline].any()
    assert bool((gradient[~is_baseline] != 0).any(1).all())


@pytest.mark.parametrize("path", ["float32", "bfloat16", "lora"])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_policy_that_is_its_reference_starts_at_log_2_exactly(
    name: str, path: str, tiny_llama: LlamaForCausalLM
) -> None:
    reference = copy.deepcopy(tiny_llama)
    student = add_adapters(tiny_llama, 2, seed=1) if path == "lora" else tiny_llama
    module = TrainingModule(
        student,
        build(name),
        frozen={"reference": reference},
        compute_dtype=torch.bfloat16 if path == "bfloat16" else torch.float32,
    )
    module.train()
    packs = pair_packs(((60, 35), (41, 90)), ids=250)
    if name == "kto":
        packs = [{**pack, "groups": torch.tensor([-1, -1])} for pack in packs]
    output = module(**collate(packs))
    sums = dict(zip(module.term_names, output["sums"].tolist(), strict=True))
    expected = math.log(2) if name == "dpo" else 0.5
    assert output["loss"].item() == pytest.approx(expected, rel=1e-7)
    assert sums["margin"] == sums["kl"] == 0
    output["loss"].backward()
    assert all(p.grad is None for p in reference.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "aligndistil", "kto"])
def test_shared_prompts_give_the_loss_and_every_gradient_of_repeated_ones(
    name: str, tiny_llama: LlamaForCausalLM
) -> None:
    tiny_llama.double()
    networks = {network: other(tiny_llama, by=1.1 + n / 10) for n, network in enumerate(("reference", "plus", "minus"))}
    module = TrainingModule(tiny_llama, build(name), frozen=networks)
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 4, 7), (5, 8, 3), (1, 3, 2)]  # of prompt and both answers; the last prompt cannot be shared
    pairs = [[torch.randint(3, 250, (n,), generator=generator).tolist() for n in shape] for shape in shapes]
    batches = [batch_of([(a, b, c) for a, b, c in pairs], shared=shared) for shared in (True, False)]
    if name == "kto":
        batches = [
            {**batch, "sides": torch.where(batch["sides"] == REJECTED, BASELINE, batch["sides"])} for batch in batches
        ]
    assert batches[0]["input_ids"].shape[1] < batches[1]["input_ids"].shape[1]
    results = [(module(**batch)["sums"], gradients(module, batch)) for batch in batches]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-8)
    assert_equal(*(found for _, found in results))


def test_an_objective_says_what_it_needs() -> None:
    needs = {name: ObjectiveConfig(name=name) for name in ("dpo", "ipo", "simpo", "orpo", "kto")}
    assert [name for name, config in needs.items() if config.networks == ("reference",)] == ["dpo", "ipo", "kto"]
    assert {config.data for name, config in needs.items() if name != "kto"} == {"preferences"}
    assert needs["kto"].data == "labels"
    assert {config.cross_entropy for config in needs.values()} == {0.0}
    batch = collate(pair_packs())
    assert build("dpo").needs(batch).keys() == {"student", "reference"}
    assert build("simpo").needs(batch).keys() == {"student"}
    assert not any(config.uses_teacher for config in needs.values())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dpo:beta=0", "dpo: beta is 0; choose a positive number"),
        ("dpo:smoothing=0.5", "smoothing is 0.5; choose a number from 0 to below 0.5"),
        ("ipo:nll=-1", "nll is -1; choose a number of at least 0"),
        ("orpo:swap=2", "swap is 2; choose 1 for yes or 0 for no"),
        ("simpo:smoothing=0.1", "simpo has no option 'smoothing'"),
    ],
)
def test_an_option_out_of_its_range_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(text)


def test_cross_entropy_beside_a_loss_of_pairs_is_refused() -> None:
    with pytest.raises(UsageError, match="cross-entropy would train on rejected answers too"):
        ObjectiveConfig(name="dpo", cross_entropy=0.5)


def test_objectives_of_different_data_are_refused() -> None:
    with pytest.raises(UsageError, match="dpo trains on preferences and kto on labels; keep one"):
        _ = ObjectiveConfig(name="0.5*dpo+0.5*kto").data


@pytest.mark.parametrize("name", ALIGNED)
def test_distill_refuses_an_objective_that_does_not_train_on_text(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} trains on .*; use potstill align"):
        DistillConfig(teacher="t", student="s", data="d", objective=ObjectiveConfig(name=name))


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_batch_of_text_is_refused(name: str) -> None:
    batch = {key: value for key, value in collate(packs_for(name)).items() if key not in ("sides", "groups", "pairs")}
    with pytest.raises(DataError, match=f"train {name} on preferences"):
        build(name).counts(batch)
