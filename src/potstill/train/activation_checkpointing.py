"""The blocks of a language model, and how a run computes them: with activation checkpoints, or compiled."""

import contextlib
import warnings
from collections.abc import Iterator
from itertools import chain

from torch import nn
from transformers import PreTrainedModel

from potstill.core.device import compile_modules
from potstill.core.errors import UnsupportedModel
from potstill.models.signals import unwrap_model
from potstill.train.config import TrainConfig
from potstill.train.training_module import TrainingModule


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a language model: the `ModuleList` with the most weights (lists of experts are inside of it).

    Raises: UnsupportedModel if the model has no `ModuleList`.
    """
    block_lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not block_lists:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of blocks to shard or compile; omit --shard and --compile"
        )
    return max(
        block_lists, key=lambda block_list: sum(weight.numel() for block in block_list for weight in block.parameters())
    )


@contextlib.contextmanager
def apply_block_settings(
    module: TrainingModule, config: TrainConfig, *, compile_backend: str = "inductor"
) -> Iterator[None]:
    """Inside, the blocks of `module` run as `config` says: compiled by `compile_backend`, or with checkpoints, or both.

    Afterwards the models are as before.

    Raises: UnsupportedModel if a model has no blocks, or cannot be checkpointed.
    """
    with contextlib.ExitStack() as stack:
        for student in module.students if config.checkpoint_activations else ():
            stack.enter_context(activation_checkpointing(unwrap_model(student)))
        if config.compile:
            student_blocks = find_blocks(module.student)
            if config.checkpoint_activations:  # compiled parts have to be inside of checkpointed ones
                student_blocks = [part for block in student_blocks for part in block.children()]
            stack.enter_context(
                compile_modules(chain(student_blocks, *map(find_blocks, module.frozen_models)), backend=compile_backend)
            )
        yield


@contextlib.contextmanager
def activation_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, and in train mode, each block saves only its input, and is computed again in the backward.

    Source: Chen et al., arXiv:1604.06174, with a checkpoint for every block.

    Raises: UnsupportedModel if the model does not support it.
    """
    check_activation_checkpointing(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # the new name does not exist before transformers 5
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # only reentrant checkpoints need them to pass a frozen embedding
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            model.gradient_checkpointing_disable()


def check_activation_checkpointing(model: nn.Module) -> None:
    """Refuse a student that does not support activation checkpointing.

    Raises: UnsupportedModel.
    """
    plain_model = unwrap_model(model)
    if not plain_model.supports_gradient_checkpointing:
        raise UnsupportedModel(
            f"{type(plain_model).__name__} does not support activation checkpointing; omit --checkpoint-activations"
        )
