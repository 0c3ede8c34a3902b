"""The processes of a job under torchrun, which numbers them in the environment."""

import os


def get_rank() -> int:
    """The index of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0
