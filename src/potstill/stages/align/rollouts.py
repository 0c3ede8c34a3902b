"""What a policy samples in training, by the kind of data that its objective reads."""

from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.models.load import LoadedModel
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.data import AlignData
from potstill.train.rollouts.base import Rollout
from potstill.train.rollouts.on_policy import CompletionSampler, OnPolicyRollout


def build_rollout(config: AlignConfig, policy: LoadedModel, data: AlignData) -> Rollout | None:
    """The rollout of a run; None where every answer comes from the data.

    With `on_policy` the policy answers a share of the prompts of preferences itself, in place of the chosen answers.

    Raises: UsageError where no token ends an answer.
    """
    if not config.on_policy:
        return None
    sampling = Sampling(vocabulary=policy.vocabulary, stop=require_stop_tokens(policy.model, policy.tokenizer))
    sampler = CompletionSampler(sampling=sampling, max_length=config.settings.context)
    return OnPolicyRollout(share=config.on_policy, sampler=sampler)
