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

from potstill.core.errors import ArtefactError, Interrupted, PeerFailed, PotstillError, UsageError

PATIENCE = timedelta(days=1)  # rank 0 measures while the others wait; a rank that dies ends them by itself
FAILED = "potstill/failed"
SHARED_OUT = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
    "a parallelism config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def count() -> int:
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0 on."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """A job that all ranks do together, over gloo on a CPU and NCCL on GPUs; they leave it together.

    What goes wrong on one rank ends all of them, and the first to fail alone says why.

    Raises: PeerFailed on the others, with that one's exit code if theirs would be the same; UsageError where accelerate
    was told to share weights out, which on a CPU it leaves undone in silence.
    """
    for name, switch in SHARED_OUT.items():
        if os.environ.get(switch, "").lower() in ("1", "true"):
            raise UsageError(
                f"accelerate is to share the weights out by {name}, and each rank here holds, saves and resumes all of "
                f"them; leave {name} out of its config or command (what is larger than a GPU: docs/scale.md)"
            )
    if count() == 1 or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(timeout=PATIENCE)
    try:
        yield
        distributed.barrier()
    except BaseException as error:
        if not _fails_first():
            raise PeerFailed("another rank failed; what it said tells why", exit_code=_code(error)) from error
        if any(sign in str(error) for sign in LOST):
            raise ArtefactError("another rank ended without a word; see its log; --resume continues") from error
        raise
    finally:
        distributed.destroy_process_group()  # whoever waits for this rank learns by it that there is none


def wait() -> None:
    """Until all ranks are here."""
    if count() > 1:
        distributed.barrier()


def told(value: Any) -> Any:
    """What rank 0 gives as `value`, on every rank."""
    if count() == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def require_same(what: str, value: str) -> None:
    """Refuse ranks that differ in `value`, before they spoil one another's gradients in silence.

    Raises: ArtefactError on all of them.
    """
    if count() == 1:
        return
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    other = next((one for one in range(count()) if found[one] != found[0]), None)
    if other is not None:
        raise ArtefactError(
            f"rank {other} has another {what} than rank 0 ({found[other]}, not {found[0]}); give all of them the same "
            f"files on one file system, the same versions and the same kind of machine"
        )


def digest_of_weights(model: nn.Module) -> str:
    """SHA-256 of all weights, names and dtypes; one read of them all."""
    found = hashlib.sha256()
    for name, weight in model.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _fails_first() -> bool:
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(FAILED, 1) == 1)
    except RuntimeError:  # whoever kept the store is gone
        return True


def _code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    return error.exit_code if isinstance(error, PotstillError) else 1
