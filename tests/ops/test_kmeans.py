"""Classes of vectors that are alike."""

import torch

from potstill.ops.kmeans import kmeans


def test_two_clouds_are_two_classes_whatever_their_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(40, 5, generator=generator) * 0.1
    clouds[20:] += 5
    for weight in (torch.ones(40), torch.rand(40, generator=generator)):
        found = kmeans(clouds, weight, 2, seed=3)
        assert len({*found[:20].tolist()}) == len({*found[20:].tolist()}) == 1
        assert found[0] != found[39]


def test_more_classes_than_vectors_and_weights_of_zero_are_fine() -> None:
    assert kmeans(torch.eye(3), torch.zeros(3), 9, seed=1).max() < 3
