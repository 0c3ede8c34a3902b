"""Two processes draw, score, train, log and evaluate as one does, for every normalization."""

from pathlib import Path

import pytest
import torch
from tests.train.policy_ranks import VARIANTS, main
from tests.train.test_distributed import launch, numbers
from transformers import LlamaForCausalLM


@pytest.mark.slow
def test_two_processes_learn_as_one_does(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    model, one, two = tmp_path / "model", tmp_path / "one", tmp_path / "two"
    tiny_llama.double().save_pretrained(model)
    for folder in (one, two):
        folder.mkdir()
    main(model, one)
    launch("tests.train.policy_ranks", model, two, ranks=2)
    whole = torch.load(one / "rank0.pt", weights_only=False)
    halves = [torch.load(two / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    for normalization in VARIANTS:
        for name, weight in whole[normalization].items():
            assert torch.equal(halves[0][normalization][name], halves[1][normalization][name]), name
            torch.testing.assert_close(halves[0][normalization][name], weight, rtol=1e-6, atol=1e-9)
        for alone, shared in zip(numbers(one / normalization), numbers(two / normalization), strict=True):
            assert shared == pytest.approx(alone, rel=1e-6)
