"""A preference loss as an extension: a field and an objective, no line of potstill changed."""

from collections.abc import Mapping
from pathlib import Path

import torch
from tests.train.small import settings, study_of
from transformers import LlamaForCausalLM

from potstill.core.types import IGNORE, Batch, Needs, Signals, Terms, supervised_positions
from potstill.data.pack_fields import PackField, declare_field
from potstill.data.packing import Packs, collate, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.train.run import train

PREFERENCE = declare_field(PackField("preference", per="document", fill=0))  # 1: chosen, -1: rejected


class DPO:
    """sum over pairs of -log sigmoid(beta (r_chosen - r_rejected)), r = log student - log reference of a completion.

    Source: Rafailov et al., "Direct Preference Optimization" (arXiv:2305.18290), equation 7.
    """

    additive = True
    weights: Mapping[str, float] = {"dpo": 1.0}

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta

    def needs(self, batch: Batch) -> dict[str, Needs]:
        positions = supervised_positions(batch)[0]
        return {"student": Needs(positions), "teacher": Needs(positions)}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"dpo": int(batch["groups"].max()) + 1}

    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        return {"dpo": -torch.nn.functional.logsigmoid(self.margins(views["student"], frozen["teacher"], batch)).sum()}

    def margins(self, student: Signals, reference: Signals, batch: Batch) -> torch.Tensor:
        """beta times the difference of log ratios of each pair `[pairs]`."""
        _, targets, segment = supervised_positions(batch)
        log_ratio = torch.stack(
            [
                -torch.nn.functional.cross_entropy(of.logits(of.rows), targets, reduction="none")
                for of in (student, reference)
            ]
        )
        signed = (log_ratio[0] - log_ratio[1]) * batch["preference"][segment]
        return self.beta * signed.new_zeros(int(batch["groups"].max()) + 1).index_add(
            0, batch["groups"][segment], signed
        )


def preference_packs(pairs: int = 24) -> Packs:
    """Pairs with one prompt: the chosen answer repeats token 7, the rejected one token 9."""
    generator, rows = torch.Generator().manual_seed(2), []
    for group in range(pairs):
        prompt = torch.randint(20, 250, (int(torch.randint(3, 7, (1,), generator=generator)),), generator=generator)
        for answer, preference in ((7, 1), (9, -1)):
            ids = [*prompt.tolist(), *[answer] * 4]
            labels = [IGNORE] * len(prompt) + [answer] * 4
            rows.append(TokenizedDocument(ids, labels, {"groups": group, "preference": preference}))
    return pack(rows, length=32, seed=1)


def test_training_on_pairs_raises_the_margin_of_held_out_pairs(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = study_of(tiny_llama, objective=DPO())
    study._frozen_models.models_by_name["teacher"].load_state_dict(tiny_llama.state_dict())  # the reference
    packs = preference_packs()
    held_out = collate([preference_packs(27)[i] for i in range(2)])
    before = study(**held_out)["loss"].item()
    assert abs(before - torch.tensor(2.0).log().item()) < 1e-5
    train(study, packs, settings(micro_tokens=32), tmp_path, show=False)
    assert study(**held_out)["loss"].item() < before - 0.05


def test_the_loss_of_packs_together_is_that_of_each_pair_alone(tiny_llama: LlamaForCausalLM) -> None:
    study = study_of(tiny_llama.double(), objective=DPO())
    packs = preference_packs(7)
    whole = study(**collate([packs[i] for i in range(len(packs))]))
    parts = [study(**collate([packs[i]])) for i in range(len(packs))]
    torch.testing.assert_close(whole["sums"], torch.stack([part["sums"] for part in parts]).sum(0))
    assert int(study.counts(collate([packs[i] for i in range(len(packs))]))) == 7
