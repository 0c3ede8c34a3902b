"""Early exit: the draft is the first layers of the target with its final norm and head.

It pays for models whose early layers are trained to predict, as LayerSkip does. The draft has keys and values of its
own; they equal those of the target's first layers.

Source: Elhoushi et al., "LayerSkip" (arXiv:2404.16710), section 4.3.
"""

from potstill.core.errors import UsageError
from potstill.decode.drafters.draft_setup import DrafterSpec, DraftSetup
from potstill.decode.drafters.model_drafter import ModelDrafter, make_model_drafter
from potstill.models.layer_view import count_layers, keep_layers


def make_early_exit(setup: DraftSetup, argument: str) -> ModelDrafter:
    """A drafter with the first `argument` layers.

    Raises: UsageError unless it is a number from 1 to one less than the layers of the model.
    """
    num_layers = count_layers(setup.model)
    if not argument.isdecimal() or not 1 <= int(argument) < num_layers:
        raise UsageError(
            f"exit:{argument} is no number of layers from 1 to {num_layers - 1}, such as exit:{num_layers // 2}"
        )
    view = keep_layers(setup.model, range(int(argument)))
    return make_model_drafter(setup, view, context=setup.context)


SPEC = DrafterSpec(
    name="exit",
    argument="LAYERS",
    help="the first layers of the model with its head, such as exit:8",
    length="4",
    make=make_early_exit,
)
