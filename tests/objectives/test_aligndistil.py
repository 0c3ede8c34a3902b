"""AlignDistil over whole networks: value and every gradient beside the plain definition, and which tokens it trains."""

import pytest
import torch
from tests.objectives.test_every_gradient import Small
from tests.objectives.test_preference import differentiate, pack_of, pair_packs
from torch import Tensor

from potstill.core.errors import UsageError
from potstill.core.types import CHOSEN, Batch, Objective, Signals, supervised_positions
from potstill.data.packing import collate
from potstill.objectives.config import ObjectiveConfig
from potstill.ops import fused

IDS = 7
FORMS = {  # the options, and (ratio of the TVD with its half, epsilon or constant alpha, contrast)
    "aligndistil": (20.0, 1e-3, True),
    "aligndistil:ratio=3,epsilon=0.5,beta=0.3": (3.0, 0.5, True),
    "aligndistil:adaptive=0,weight=2": (0.0, 2.0, True),
    "aligndistil:adaptive=0,weight=2,contrast=0": (0.0, 2.0, False),
    "aligndistil:contrast=0": (20.0, 1e-3, False),
    "aligndistil:mean=tokens": (20.0, 1e-3, True),
    "aligndistil:compat=official,ratio=10": (20.0, 1e-3, True),
    "aligndistil:compat=official,mean=tokens,adaptive=0": (0.0, 1.0, True),
}


def build(name: str) -> Objective:
    return ObjectiveConfig.parse(name, cross_entropy=0.7, temperature=1.0).build()


def networks(name: str) -> dict[str, Small]:
    names = ("student", "plus", "reference" if "contrast=0" in name else "minus")
    return {key: Small(IDS, 4 + n, seed=n, scale=0.5 + n) for n, key in enumerate(names)}


def literal(name: str, read: dict[str, Signals], batch: Batch) -> Tensor:
    """The loss summed over answers, in the formulas of the paper, from all logits at once."""
    ratio, epsilon, contrast = FORMS[name]
    beta = 0.3 if "beta" in name else 0.1
    q, plus, minus = (signals.logits(signals.rows).log_softmax(-1) for signals in read.values())
    plus, minus = plus.detach(), minus.detach()
    documents, total = supervised_positions(batch)[2], torch.zeros((), dtype=torch.float64)
    for number, side in enumerate(batch["sides"].tolist()):
        rows = (documents == number).nonzero()[:, 0].tolist()
        if side not in (CHOSEN, -1):
            continue
        if "official" in name:
            rows = rows[1:]
        for n in rows:
            alpha = ratio * 0.5 * (plus[n].exp() - minus[n].exp()).abs().sum() + epsilon
            z = (plus[n] if contrast else minus[n]) + alpha * (plus[n] - minus[n])
            kl = (q[n].exp() * (q[n] - z.log_softmax(-1))).sum()
            total = total + beta / alpha * kl / (1 if "tokens" in name else len(rows))
    return total


def run(name: str, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    models, objective = networks(name), build(name)
    read = {key: model.read(batch) for key, model in models.items()}
    terms = objective({"student": read.pop("student")}, read, batch)
    assert all(p.grad is None for key in read for p in models[key].parameters())
    return dict(terms), differentiate(terms["aligndistil"], models["student"])


def sampled_packs() -> list[dict[str, Tensor]]:
    """Pairs, and a document without a side, which the policy wrote."""
    packs = pair_packs()
    own = pack_of([(packs[0]["input_ids"][:6], packs[0]["labels"][:6])], [-1], [-1])
    return [*packs, own]


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("name", FORMS)
def test_value_and_every_gradient_are_those_of_the_definition(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "rows_per_chunk", lambda vocabulary: chunk)
    batch, models = collate(sampled_packs()), networks(name)
    expected = literal(name, {key: model.read(batch) for key, model in models.items()}, batch)
    terms, gradients = run(name, batch)
    torch.testing.assert_close(terms["aligndistil"], expected.detach(), rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients, differentiate(expected, models["student"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["aligndistil", "aligndistil:mean=tokens"])
def test_passes_of_one_pair_each_sum_to_one_pass(name: str) -> None:
    packs, objective = sampled_packs(), build(name)
    whole = run(name, collate(packs))
    parts = [run(name, collate([pack])) for pack in packs]
    for key, value in whole[0].items():
        torch.testing.assert_close(value, torch.stack([terms[key] for terms, _ in parts]).sum(), rtol=1e-9, atol=1e-11)
    for n, gradient in enumerate(whole[1]):
        torch.testing.assert_close(gradient, sum(found[n] for _, found in parts), rtol=1e-8, atol=1e-11)
    counts = objective.counts(collate(packs))
    assert counts == {key: sum(objective.counts(collate([pack]))[key] for pack in packs) for key in counts}


def test_counts_are_chosen_and_sampled_answers_or_their_tokens() -> None:
    batch = collate(sampled_packs())  # answers of 4, 7, 3 and 4 tokens
    assert build("aligndistil").counts(batch) == {"aligndistil": 4, "chosen_log_p": 4, "chosen_tokens": 4}
    assert build("aligndistil:mean=tokens").counts(batch)["aligndistil"] == 18
    assert build("aligndistil:mean=tokens,compat=official").counts(batch)["aligndistil"] == 14
    assert run("aligndistil", batch)[0]["chosen_tokens"].item() == 18


def test_text_without_sides_is_trained_whole() -> None:
    batch = {key: value for key, value in collate(sampled_packs()).items() if key not in ("sides", "groups", "pairs")}
    assert build("aligndistil").counts(batch)["aligndistil"] == 7


def test_rows_of_rejected_answers_and_the_first_official_token_have_no_gradient() -> None:
    batch = collate(pair_packs())
    for name in ("aligndistil", "aligndistil:compat=official"):
        read = {key: model.read(batch) for key, model in networks(name).items()}
        rows = read["student"].rows.detach().requires_grad_()
        student = Signals(rows, read["student"].logits, read.pop("student").head)
        (gradient,) = torch.autograd.grad(build(name)({"student": student}, read, batch)["aligndistil"], rows)
        documents = supervised_positions(batch)[2]
        is_trained = batch["sides"][documents] == CHOSEN
        if "official" in name:
            is_trained[[0, *((documents[1:] != documents[:-1]).nonzero()[:, 0] + 1).tolist()]] = False
        assert torch.equal((gradient != 0).any(1), is_trained)


def test_it_needs_two_policies_or_one_and_the_reference() -> None:
    assert ObjectiveConfig(name="aligndistil").networks == ("plus", "minus")
    config = ObjectiveConfig.parse("aligndistil:contrast=0", cross_entropy=0.7, temperature=1.0)
    assert config.networks == ("plus", "reference")
    assert config.data == "preferences"
    assert config.build().needs(collate(pair_packs())).keys() == {"student", "plus", "reference"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aligndistil:mean=rows", "mean is 'rows'; choose sequences or tokens"),
        ("aligndistil:compat=paper", "compat is 'paper'; choose official, or omit it"),
        ("aligndistil:epsilon=0", "epsilon is 0; choose a positive number"),
        ("aligndistil:adaptive=0,weight=0", "weight is 0; choose a positive number"),
        ("aligndistil:contrast=2", "contrast is 2; choose 1 for yes or 0 for no"),
    ],
)
def test_an_option_out_of_its_range_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build(text)
