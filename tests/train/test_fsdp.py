"""A sharded run learns what an unsharded one learns, and leaves the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.sharded import CASES, run
from tests.train.small import settings, some_packs, study_of
from tests.train.test_distributed import launch, numbers
from transformers import LlamaForCausalLM

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.train import fsdp
from potstill.train.activation_checkpointing import find_blocks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch("tests.train.sharded", folder, ranks=2)
    return folder


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[Any, Any]]:
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_trains_evaluates_and_resumes_as_one_process_does(
    ranks: list[Any], out: Path, tmp_path: Path, case: str
) -> None:
    whole = run(case, tmp_path, shard=False)
    for line, expected in zip(numbers(out / case), numbers(tmp_path / case), strict=True):
        assert line == pytest.approx(expected, rel=1e-6)
    for found in (rank[case] for rank in ranks):
        assert found["result"]["losses"] == pytest.approx(whole["result"]["losses"], rel=1e-6)
        assert found["weights"].keys() == whole["weights"].keys()
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-6, atol=1e-8)
            assert torch.equal(found["resumed"][name], found["weights"][name]), name
        assert found["local"] < 0.52 * whole["local"]
    assert sum(rank[case]["local"] for rank in ranks) == whole["local"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_a_sharded_run_holds_whole_weights(ranks: list[Any], out: Path, case: str) -> None:
    saved = LlamaForCausalLM.from_pretrained(out / case / "checkpoint-4", dtype=torch.float64).state_dict()
    for name, weight in ranks[0][case]["weights"].items():
        assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "needs several processes; start the command with torchrun"),
        ({}, {"lora": 4}, "omit one of them"),
        ({}, {"on_policy": 0.5}, "--on-policy samples"),
        ({"compile": True}, {}, "--compile does not work with --shard"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    changes: dict[str, Any], options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsdp.check_sharding(settings(**changes), **options)
    if changes or options:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=message):
        fsdp.check_sharding(settings(shard=True, **changes), **options)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear has no list of blocks"):
        find_blocks(torch.nn.Linear(2, 2))


@pytest.mark.gpu
def test_on_a_gpu_a_sharded_module_gives_the_loss_of_a_whole_one(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    from potstill.data.packing import collate

    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        batch = {name: values.cuda() for name, values in collate([some_packs()[0]]).items()}
        whole = study_of(tiny_llama).cuda()
        for model in whole.frozen_models:
            model.cuda()
        sharded = fsdp.shard_module(whole, init_device_mesh("cuda", (1,)))
        torch.testing.assert_close(sharded(**batch)["loss"], whole(**batch)["loss"])
    finally:
        distributed.destroy_process_group()
