"""The processes (ranks) that a launcher such as torchrun or accelerate starts to run one job together.

They also work in a single process. Only rank 0 writes, measures, draws and prints.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from potstill.core.errors import ArtifactError, Interrupted, PeerFailed, PotstillError, UsageError
from potstill.core.ranks import is_main_process as is_main_process

TIMEOUT = timedelta(days=1)  # others wait while rank 0 measures; a rank that dies ends the others without a timeout
FAILURE_KEY = "potstill/failed"
SHARDING_SWITCHES = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
CONNECTION_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def world_size() -> int:
    """The number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connects the ranks for one job, over gloo on a CPU and NCCL on GPUs. All ranks leave it together.

    An error on one rank ends all ranks. Only the first rank to fail reports the reason.

    Raises:
        PeerFailed: on the other ranks, with the exit code of their own error.
        ArtifactError: another rank died without a message.
        UsageError: accelerate is configured to shard weights; on a CPU it would silently not shard them.
    """
    for name, switch in SHARDING_SWITCHES.items():
        if os.environ.get(switch, "").lower() in ("1", "true"):
            raise UsageError(
                f"accelerate is configured to shard the weights by {name}, which potstill does not support; remove "
                f"{name} from its config or command, and use --shard under torchrun instead (docs/scale.md)"
            )
    if world_size() == 1 or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(timeout=TIMEOUT)
    try:
        yield
        distributed.barrier()
    except BaseException as error:
        if not _is_first_failure():
            raise PeerFailed("another rank failed; see its message", exit_code=_get_exit_code(error)) from error
        if any(message in str(error) for message in CONNECTION_ERRORS):
            raise ArtifactError("another rank ended without a message; see its log; --resume continues") from error
        raise
    finally:
        distributed.destroy_process_group()  # ranks that wait for this one get an error


def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        distributed.barrier()


def broadcast_from_main(value: Any) -> Any:
    """The `value` of rank 0, on every rank."""
    if world_size() == 1:
        return value
    objects: list[Any] = [value]
    distributed.broadcast_object_list(objects, src=0)
    return objects[0]


def gather_from_ranks(value: Any) -> list[Any]:
    """The `value` of every rank, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def sum_over_ranks(values: Mapping[str, int | float]) -> dict[str, int | float]:
    """The sum over all ranks of each value, on every rank; a rank without a value has 0."""
    totals: dict[str, int | float] = {}
    for part in gather_from_ranks(dict(values)):
        for name, value in part.items():
            totals[name] = totals.get(name, 0) + value
    return totals


def check_same_on_all_ranks(label: str, value: str) -> None:
    """Refuse ranks that differ in `value`, because their gradients would not match.

    Raises: ArtifactError on all ranks.
    """
    values = gather_from_ranks(value)
    odd_rank = next((index for index in range(len(values)) if values[index] != values[0]), None)
    if odd_rank is not None:
        raise ArtifactError(
            f"rank {odd_rank} has another {label} than rank 0 ({values[odd_rank]}, not {values[0]}); give all "
            f"ranks the same files, the same package versions and the same kind of machine"
        )


def hash_weights(model: nn.Module) -> str:
    """The first 16 hex digits of the SHA-256 of all weights, names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _is_first_failure() -> bool:
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(FAILURE_KEY, 1) == 1)
    except RuntimeError:  # the rank that held the store has ended
        return True


def _get_exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    return error.exit_code if isinstance(error, PotstillError) else 1
