"""The blocks of a language model, and how a run has them computed: twice, to save memory, or compiled."""

import contextlib
import warnings
from collections.abc import Iterator
from itertools import chain

from torch import nn
from transformers import PreTrainedModel

from potstill.core import backend
from potstill.core.errors import UnsupportedModel
from potstill.models.signals import plain
from potstill.train.settings import Settings
from potstill.train.study import Study


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a language model: its heaviest list of modules (experts, of which there may be more, lie inside).

    Raises: UnsupportedModel.
    """
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of blocks to share out or compile; use one rank")
    return max(lists, key=lambda found: sum(weight.numel() for block in found for weight in block.parameters()))


@contextlib.contextmanager
def blocks_run(study: Study, settings: Settings, *, by: str = "inductor") -> Iterator[None]:
    """Inside, the blocks of `study` run as `settings` ask for (compiled `by`); afterwards its models are as they were.

    Raises: UnsupportedModel where a model has no blocks that could.
    """
    with contextlib.ExitStack() as stack:
        if settings.checkpoint_activations:
            stack.enter_context(checkpointed(plain(study.student)))
        if settings.compile:
            taught = blocks(study.student)
            if settings.checkpoint_activations:  # what is compiled has to lie inside what is computed twice
                taught = [part for block in taught for part in block.children()]
            stack.enter_context(backend.compiled(chain(taught, *map(blocks, study.companions)), by=by))
        yield


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, and in train mode, each block keeps its input alone and is computed again in the backward.

    Source: Chen et al., arXiv:1604.06174, with a checkpoint for every block.

    Raises: UnsupportedModel.
    """
    require_checkpointing(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # the name that is new in transformers 5 is no older
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # only reentrant checkpoints lose the gradient where the embedding is frozen
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            model.gradient_checkpointing_disable()


def require_checkpointing(model: nn.Module) -> None:
    """Refuse a student whose blocks cannot be computed twice.

    Raises: UnsupportedModel.
    """
    inner = plain(model)
    if not inner.supports_gradient_checkpointing:
        raise UnsupportedModel(f"{type(inner).__name__} cannot compute its blocks twice; omit --checkpoint-activations")
