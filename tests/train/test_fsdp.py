"""A study that is shared out over ranks learns what it learns whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.sharded import CASES, STEPS, optimiser_of, study, trained
from tests.train.test_distributed import launch

from potstill.core.errors import UnsupportedModel
from potstill.train import fsdp
from potstill.train.activation_checkpointing import find_blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch("tests.train.sharded", folder, ranks=2)
    return folder


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[Any, Any]]:
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_norms_and_weights_are_those_of_one_process(ranks: list[Any], case: tuple[bool, bool]) -> None:
    model = study(case[0])
    losses, norms, gradients = trained(model, optimiser_of(model), range(STEPS))
    weights = model.student.state_dict()
    for found in (rank[case] for rank in ranks):
        assert found["losses"] == pytest.approx(losses, rel=1e-9)
        assert found["norms"] == pytest.approx(norms, rel=1e-9)
        assert found["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-6, atol=1e-10)
        assert found["weights"].keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_in_shares_goes_on_to_the_same_bits(ranks: list[Any], case: tuple[bool, bool]) -> None:
    for found in (rank[case] for rank in ranks):
        for name, weight in found["weights"].items():
            assert torch.equal(found["resumed"][name], weight), name


def test_a_checkpoint_in_shares_goes_on_in_one_process(out: Path, ranks: list[Any]) -> None:
    model = study(CASES[0][0])
    optimiser = optimiser_of(model)
    fsdp.load_sharded(model, optimiser, out / "checkpoint-0")
    trained(model, optimiser, range(2, STEPS))
    for name, weight in model.student.state_dict().items():
        torch.testing.assert_close(ranks[0][CASES[0]]["weights"][name], weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_share_alone(ranks: list[Any], case: tuple[bool, bool]) -> None:
    whole = sum(weight.numel() for weight in study(case[0]).parameters())
    assert sum(rank[case]["local"] for rank in ranks) == whole
    assert max(rank[case]["local"] for rank in ranks) < 0.52 * whole


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear has no list of blocks"):
        find_blocks(torch.nn.Linear(2, 2))


@pytest.mark.gpu
def test_on_a_gpu_a_study_in_shares_gives_the_loss_of_a_whole_one(tmp_path: Path) -> None:
    from tests.train.small import some_packs
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from potstill.data.packing import collate

    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        batch = {name: values.cuda() for name, values in collate([some_packs()[0]]).items()}
        whole, model = study(True).cuda(), study(True).cuda()
        for one in (whole, model):
            one._frozen_models["teacher"].cuda()
        fsdp.shard_module(model, init_device_mesh("cuda", (1,)))
        losses = [one(**batch)["loss"] for one in (whole, model)]
        torch.testing.assert_close(losses[1], losses[0])
    finally:
        distributed.destroy_process_group()
