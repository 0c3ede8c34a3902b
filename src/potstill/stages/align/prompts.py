"""Prompts of a policy gradient: what is trained on and measured on, and how their answers are drawn and scored."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError, UnsupportedModel, UsageError
from potstill.core.screen import status
from potstill.data.corpus import Corpus, remove_held_out
from potstill.data.prompt_rows import Prompt, load_prompts, pack_prompts, read_prompts
from potstill.data.prompts import PromptTokenizer
from potstill.data.token_dataset import TextReport
from potstill.models.spec import read_model_spec
from potstill.stages.align.align_data import AlignData
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prompt_sampling import PromptEvaluator
from potstill.stages.console import print_note
from potstill.stages.corpus import load_data
from potstill.stages.dataset import load_held_out_corpus, load_tokenizer
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.reading_report import build_corpus_facts, report_reading
from potstill.stages.text_options import prepare_tokenizer
from potstill.teachers.served_judge import open_judge
from potstill.train.rewards.registry import get_reward
from potstill.train.rewards.weighted import RewardSum

TOO_LONG = "a prompt whose answers do not fit"


@dataclass(frozen=True, kw_only=True)
class PromptData(AlignData):
    """The prompts behind the packs, the reward of their answers, and the tokenizer of both."""

    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    reward: RewardSum
    tokenizer: PreTrainedTokenizerBase


@status("reading the prompts")
def read_prompt_data(config: AlignConfig, tokenizer: PreTrainedTokenizerBase) -> PromptData:
    """The prompts to train on, and at most `config.documents` others to measure on.

    Raises: DataError, NotFound as `load_prompts` does; DataError for a row without a column that the reward reads, or
        if the answers to no prompt fit into a pass; UsageError, MissingDependency as `get_reward` does.
    """
    assert config.reward is not None, "the options have been checked"
    reward = get_reward(config.reward, open_judge=open_judge)
    for note in reward.notes:
        print_note(note)
    dataset_config = DatasetConfig.from_training(config)
    corpus = load_data(dataset_config, load=load_prompts)
    held_out_corpus = load_held_out_corpus(dataset_config, load=load_prompts)
    corpus = remove_held_out(corpus, held_out_corpus.documents)
    read = PromptTokenizer(tokenizer, special_in_text=config.special_in_text)
    prompts = select_prompts(config, corpus, read_prompts(corpus.documents, read, columns=reward.columns))
    check_prompts_per_step(config, len(prompts))
    documents = held_out_corpus.documents.select(range(min(config.documents, len(held_out_corpus))))
    held_out = select_prompts(config, held_out_corpus, read_prompts(documents, read, columns=reward.columns))
    packs, validation_packs = pack_prompts(prompts), pack_prompts(held_out)
    report_reading(corpus, packs, TextReport())
    evaluator = PromptEvaluator(config=config, prompts=held_out, reward=reward, tokenizer=tokenizer)
    return PromptData(
        packs=packs,
        validation_packs=validation_packs,
        digest=hash_prompts([*prompts, *held_out]),
        facts={
            **build_corpus_facts(corpus, packs, TextReport()),
            "prompts": len(prompts),
            "reward": config.reward,
            "measured_on": f"{held_out_corpus.name} ({held_out_corpus.provenance.get('split', 'all')}), "
            f"{evaluator.subject}",
            "measured_digest": held_out_corpus.digest,
        },
        evaluator=evaluator,
        run_facts={"rewards": reward.digests} if reward.digests else {},
        prompts=prompts,
        held_out=held_out,
        reward=reward,
        tokenizer=tokenizer,
    )


def select_prompts(config: AlignConfig, corpus: Corpus, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose groups fit into the context of the run; a note says how many are left out.

    Raises: DataError if there is none.
    """
    context = config.settings.context
    sizes = [count_group_tokens(len(prompt.input_ids), config.samples, config.max_tokens) for prompt in prompts]
    selected = [prompt for prompt, size in zip(prompts, sizes, strict=True) if size <= context]
    if not selected:
        raise DataError(
            f"{config.samples} answers of {config.max_tokens} tokens to a prompt of {corpus.name} take at least "
            f"{min(sizes, default=0):,.0f} tokens, and a pass holds groups of {context}; raise --context, or lower "
            f"--samples or --max-tokens"
        )
    if len(selected) < len(prompts):
        print_note(f"{corpus.name}: left out {len(prompts) - len(selected):,} with {TOO_LONG} into --context {context}")
    return selected


def check_prompts_per_step(config: AlignConfig, count: int) -> None:
    """Refuse steps of more prompts than there are. Raises: UsageError."""
    if config.settings.packs_per_step > count:
        option = "--prompts-per-step" if config.settings.prompts_per_step else "--batch-tokens"
        raise UsageError(
            f"a step takes {config.settings.packs_per_step:,} prompts, and there are {count:,} to train on; lower "
            f"{option}, or give more --data"
        )


def limit_prompts_per_step(config: AlignConfig) -> AlignConfig:
    """The config whose steps take all prompts, with a note, where its `prompts_per_step` are more than there are.

    Raises: as `read_prompt_data` does.
    """
    settings = config.settings
    if config.loss.data != "prompts" or not settings.prompts_per_step:
        return config
    tokenizer = _load_tokenizer(config)
    prepare_tokenizer(tokenizer, config)
    data = read_prompt_data(replace(config, settings=replace(settings, prompts_per_step=1)), tokenizer)
    count = len(data.prompts)
    if count >= settings.prompts_per_step:
        return config
    print_note(f"each step takes all {count:,} prompts, since there are fewer than {settings.prompts_per_step:,}")
    return replace(config, settings=replace(settings, prompts_per_step=count))


def _load_tokenizer(config: AlignConfig) -> PreTrainedTokenizerBase:
    try:
        flags = {"allow_pickle": config.allow_pickle, "trust_remote_code": config.trust_remote_code}
        return read_model_spec(config.model, **flags).tokenizer
    except UnsupportedModel:
        return load_tokenizer(config.model)


def count_group_tokens(prompt_tokens: int | float, samples: int, max_tokens: int) -> int | float:
    """The most tokens of a group: the prompt without its last token, which begins each of the samples."""
    return prompt_tokens - 1 + samples * (1 + max_tokens)


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """The SHA-256 of prompts and rows, in order."""
    text = json.dumps([[list(prompt.input_ids), dict(prompt.row)] for prompt in prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
