"""Self-speculation by skipped layers: the draft is the target itself without some of its layers.

It needs no second model and no training, and shares all weights. The draft has keys and values of its own.

Source: Zhang et al., "Draft & Verify" (arXiv:2309.08168), which chooses the sublayers by Bayesian optimization. Here
whole layers are skipped: those that the user names, or a share of them, evenly, but never the first and the last.
"""

from potstill.core.errors import UsageError
from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.model_drafter import ModelDrafter, make_model_drafter
from potstill.models.layer_view import count_layers, keep_layers


def make_layer_skip(setup: DraftSetup, argument: str) -> ModelDrafter:
    """A drafter that skips the layers of `argument`: a list such as 3,5-8, or a share such as 0.5.

    Raises: UsageError for anything else, or for layers that do not exist.
    """
    num_layers = count_layers(setup.model)
    skipped = list_skipped(argument, num_layers)
    if not skipped:
        raise UsageError(f"skip:{argument} skips none of the {num_layers} layers; give a larger share, or a list")
    if skipped[-1] >= num_layers:
        raise UsageError(f"skip:{argument} names layer {skipped[-1]}; the model's layers are 0 to {num_layers - 1}")
    view = keep_layers(setup.model, [layer for layer in range(num_layers) if layer not in skipped])
    return make_model_drafter(setup, view, context=setup.context)


def list_skipped(argument: str, num_layers: int) -> list[int]:
    """The layers to skip, counted from 0, in ascending order.

    Raises: UsageError for an argument that is neither a list of layers nor a share between 0 and 1.
    """
    if "." in argument:
        return _spread(_parse_share(argument), num_layers)
    layers: set[int] = set()
    for piece in argument.split(","):
        first, _, last = piece.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UsageError(f"skip:{argument} names no layers; write a list such as skip:3,5-8 or a share: skip:0.5")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers)


def _parse_share(argument: str) -> float:
    try:
        share = float(argument)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UsageError(f"skip:{argument} is no share; give a number between 0 and 1, such as skip:0.5")
    return share


def _spread(share: float, num_layers: int) -> list[int]:
    """Every layer at which the number of skipped ones, `share` of the inner layers so far, rises."""
    inner = range(1, num_layers - 1)
    return [layer for layer in inner if int(layer * share + 1e-9) > int((layer - 1) * share + 1e-9)]


SPEC = DrafterSpec(
    name="skip",
    argument="LAYERS",
    help="the model without some layers: a list such as skip:3,5-8, or a share such as skip:0.5",
    length="4",
    make=make_layer_skip,
)
