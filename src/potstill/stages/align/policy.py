"""The model that an alignment trains."""

from potstill.core.errors import UsageError
from potstill.evaluate.scoring_windows import check_context
from potstill.models.causality import require_causal
from potstill.models.elastic import get_sizes
from potstill.models.load import LoadedModel
from potstill.models.quantization import check_trainable
from potstill.stages.align.config import AlignConfig
from potstill.stages.run_models import load_run_model


def load_policy(config: AlignConfig) -> LoadedModel:
    """The model to train, in float32.

    Raises: NotFound; UnsupportedModel for a quantized model, or one that sees the token that it is to predict;
        UsageError for several sizes or a short context.
    """
    check_trainable(config.model, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
    policy = load_run_model(config, config.model)
    require_causal(policy.model, f"the model {policy.name}")
    check_context(config.settings.context, policy.model)
    if get_sizes(policy.model):
        raise UsageError(f"{policy.name} is elastic, and align trains one size; give it as {policy.name}#0.5")
    return policy
