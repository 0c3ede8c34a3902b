"""Heads: calling one gives the weights that make logits, and a tied one stores none."""

import copy

import torch
from torch import nn

from potstill.layers.heads import LanguageHead, TiedHead


def test_a_head_gives_its_weights() -> None:
    head = LanguageHead(5, 3)
    assert head().weight is head.weight
    assert dict(head.named_parameters()).keys() == {"weight"}


def test_a_head_hands_on_its_soft_cap() -> None:
    assert LanguageHead(5, 3, softcap=2.0)().softcap == 2.0
    assert TiedHead(nn.Embedding(5, 3), softcap=2.0)().softcap == 2.0


def test_a_fresh_head_is_small_random_numbers() -> None:
    assert 0.01 < float(LanguageHead(50, 30).weight.detach().std()) < 0.03


def test_a_tied_head_stores_nothing_and_follows_the_embedding() -> None:
    embed = nn.Embedding(5, 3)
    head = TiedHead(embed)
    assert not list(head.parameters())
    assert not head.state_dict()
    embed.weight = nn.Parameter(torch.ones(5, 3))
    assert head().weight is embed.weight


def test_a_copied_model_s_tied_head_follows_the_copied_embedding() -> None:
    pair = nn.ModuleList([embed := nn.Embedding(5, 3), TiedHead(embed)])
    again = copy.deepcopy(pair)
    assert again[1]().weight is again[0].weight
    assert again[1]().weight is not embed.weight
