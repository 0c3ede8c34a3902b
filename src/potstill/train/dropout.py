"""Switches dropout off, for a loss that compares a model in training with a frozen one."""

from torch import nn

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of `model` to 0: those of modules, and the numbers that attention and layers read.

    The config keeps its values, and so does a saved model. The log-ratio of a model in training and its frozen copy is
    then 0 at the start. TRL's trainers for preferences do the same (`disable_dropout=True`).
    """
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
