"""The ranks of a launcher (torchrun, accelerate): the processes that run one job together, each with a copy of it all.

In one process every function here is trivial. What only one rank may do (write, measure, draw, show) rank 0 does.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from potstill.core.errors import ArtifactError, Interrupted, PeerFailed, PotstillError, UsageError

TIMEOUT = timedelta(days=1)  # rank 0 measures while the others wait; a rank that dies ends them by itself
FAILURE_KEY = "potstill/failed"
SHARDING_SWITCHES = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
CONNECTION_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def world_size() -> int:
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0 on."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A job that all ranks do together, over gloo on a CPU and NCCL on GPUs; they leave it together.

    What goes wrong on one rank ends all of them, and the first to fail alone says why.

    Raises: PeerFailed on the others, with that one's exit code if theirs would be the same; UsageError where accelerate
    was told to share weights out, which on a CPU it leaves undone in silence.
    """
    for name, switch in SHARDING_SWITCHES.items():
        if os.environ.get(switch, "").lower() in ("1", "true"):
            raise UsageError(
                f"accelerate is to share the weights out by {name}, and each rank here holds, saves and resumes all of "
                f"them; leave {name} out of its config or command (what is larger than a GPU: docs/scale.md)"
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
            raise PeerFailed("another rank failed; what it said tells why", exit_code=_get_exit_code(error)) from error
        if any(message in str(error) for message in CONNECTION_ERRORS):
            raise ArtifactError("another rank ended without a word; see its log; --resume continues") from error
        raise
    finally:
        distributed.destroy_process_group()  # whoever waits for this rank learns by it that there is none


def barrier() -> None:
    """Until all ranks are here."""
    if world_size() > 1:
        distributed.barrier()


def broadcast_from_main(value: Any) -> Any:
    """What rank 0 gives as `value`, on every rank."""
    if world_size() == 1:
        return value
    objects: list[Any] = [value]
    distributed.broadcast_object_list(objects, src=0)
    return objects[0]


def check_same_on_all_ranks(label: str, value: str) -> None:
    """Refuse ranks that differ in `value`, before they spoil one another's gradients in silence.

    Raises: ArtefactError on all of them.
    """
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    odd_rank = next((index for index in range(world_size()) if values[index] != values[0]), None)
    if odd_rank is not None:
        raise ArtifactError(
            f"rank {odd_rank} has another {label} than rank 0 ({values[odd_rank]}, not {values[0]}); give all "
            f"of them the same "
            f"files on one file system, the same versions and the same kind of machine"
        )


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of all weights, names and dtypes; one read of them all."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _is_first_failure() -> bool:
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(FAILURE_KEY, 1) == 1)
    except RuntimeError:  # whoever kept the store is gone
        return True


def _get_exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    return error.exit_code if isinstance(error, PotstillError) else 1
