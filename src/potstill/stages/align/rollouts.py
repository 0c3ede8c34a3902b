"""What a policy samples in training, by the kind of data that its objective reads."""

from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import require_stop_tokens
from potstill.models.load import LoadedModel
from potstill.stages.align.align_data import AlignData
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prompt_sampling import MEASURED_SAMPLES, make_sampler
from potstill.stages.align.prompts import PromptData
from potstill.train.rollouts.grouped import GroupedRollout
from potstill.train.rollouts.on_policy import CompletionSampler, OnPolicyRollout
from potstill.train.rollouts.steps import AnyRollout


def build_rollout(config: AlignConfig, policy: LoadedModel, data: AlignData) -> AnyRollout | None:
    """The rollout of a run; None where every answer comes from the data.

    With `on_policy` the policy answers a share of the prompts of preferences itself, in place of the chosen answers.

    Raises: UsageError for a model in which no token ends an answer.
    """
    if isinstance(data, PromptData):
        return build_group_rollout(config, policy, data)
    if not config.on_policy:
        return None
    sampling = Sampling(vocabulary=policy.vocabulary, stop=require_stop_tokens(policy.model, policy.tokenizer))
    sampler = CompletionSampler(sampling=sampling, max_length=config.settings.context)
    return OnPolicyRollout(share=config.on_policy, sampler=sampler)


def build_group_rollout(config: AlignConfig, policy: LoadedModel, data: PromptData) -> GroupedRollout:
    """The rollout of a policy gradient; evaluations during training draw answers to the held-out prompts."""
    sources = (data.reward, policy.model, policy.tokenizer)
    return GroupedRollout(
        sampler=make_sampler(config, data.prompts, *sources),
        validation=make_sampler(config, data.held_out, *sources, samples=MEASURED_SAMPLES),
    )
