"""The caches that take the place of frozen networks in an alignment.

The reference needs the log-probabilities of the answers alone (`potstill cache --own`). The two models of `aligndistil`
need whole distributions: their last hidden states (`potstill cache --hidden`), and the heads of the models themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from potstill.core.card import Parent
from potstill.core.device import get_dtype_name, resolve_device
from potstill.core.errors import ArtifactError, CacheMismatch, UsageError
from potstill.core.types import MINUS, PLUS, REFERENCE, Head, SignalSource
from potstill.data.packing import collate
from potstill.models.fingerprint import fingerprint_teacher, fingerprint_tokenizer
from potstill.models.load import LoadedModel
from potstill.models.signals import get_constant_head
from potstill.stages.align.align_data import AlignData
from potstill.stages.align.config import AlignConfig
from potstill.stages.run_models import load_run_model
from potstill.teachers.cached import CacheFolder, TeacherCache, find_faults, is_cache
from potstill.teachers.cached_states import CachedHiddenStates
from potstill.teachers.log_prob_cache import LogProbCache

CACHE_NOTE = "its outputs came from a cache"


def open_caches(config: AlignConfig) -> dict[str, CacheFolder]:
    """The caches of a run, by the name of the network whose place they take.

    Raises: ArtifactError for a cache that is not whole; UsageError for one that does not hold what the network gives.
    """
    if config.reference is not None and is_cache(Path(config.reference).expanduser()):
        raise UsageError(f"--reference {config.reference} is a cache; give it as --reference-cache")
    places = {REFERENCE: config.reference_cache, PLUS: config.plus, MINUS: config.minus}
    folders = {network: Path(place).expanduser() for network, place in places.items() if place is not None}
    folders = {network: folder for network, folder in folders.items() if network == REFERENCE or is_cache(folder)}
    if folders and config.on_policy:
        raise UsageError(
            "a cache holds what a model gave for one text, and --on-policy writes another; give models that are here"
        )
    if folders and config.eval_data not in (None, config.data):
        raise UsageError(
            "a cache holds the answers of --data, and those of --eval-data are not in it; omit --eval-data"
        )
    needs_distributions = PLUS in config.loss.networks
    return {
        network: _open_cache(network, folder, needs_distributions=needs_distributions)
        for network, folder in folders.items()
    }


def _open_cache(network: str, folder: Path, *, needs_distributions: bool) -> CacheFolder:
    if fault := next(find_faults(folder), None):
        raise ArtifactError(f"the cache {folder} is not whole: {fault}; make it again")
    if not needs_distributions:
        return LogProbCache(folder)
    cache = TeacherCache(folder)
    if not cache.manifest.hidden:
        raise UsageError(
            f"the cache {folder} stores no hidden states, which the {network} model needs; make it with --hidden"
        )
    return cache


def check_caches(
    config: AlignConfig, caches: Mapping[str, CacheFolder], policy: LoadedModel, data: AlignData, dtype: torch.dtype
) -> None:
    """Refuse a cache of another tokenizer, dtype or text than the run's, or without one of its documents.

    Raises: CacheMismatch.
    """
    text = data.facts["text_digest"]  # None for a stream
    facts = {"dtype": get_dtype_name(dtype), **fingerprint_tokenizer(policy.tokenizer)}
    facts |= {} if text is None else {"text": text}
    for cache in caches.values():
        cache.check_facts(facts)
        try:
            for packs in (data.packs, data.validation_packs):
                for number in range(len(packs)):
                    cache.locate_windows(collate([packs[number]]))
        except CacheMismatch as error:
            if (length := cache.manifest.facts.context) < config.settings.context:
                raise CacheMismatch(
                    f"the cache {cache.folder} holds documents of at most {length} tokens, and this run reads longer "
                    f"ones; give --context {length}, or make the cache with --context {config.settings.context}"
                ) from error
            if config.loss.data == "labels":
                raise CacheMismatch(
                    f"{config.loss.name} compares with answers to other prompts, which the cache of pairs "
                    f"{cache.folder} lacks; omit --reference-cache, or cache rows of prompt, completion and label"
                ) from error
            raise


def build_source(config: AlignConfig, cache: CacheFolder, dtype: torch.dtype) -> SignalSource:
    """The source of signals that reads a cache; one of hidden states also needs the head of its model.

    Raises: NotFound, CacheMismatch for a model that is not here, or not the one that made the cache.
    """
    if isinstance(cache, TeacherCache):
        return CachedHiddenStates(cache, _read_head(config, cache, dtype))
    assert isinstance(cache, LogProbCache)
    return cache


def _read_head(config: AlignConfig, cache: TeacherCache, dtype: torch.dtype) -> Head:
    """The head of the model that made a cache, on the device of the run."""
    loaded = load_run_model(config, cache.manifest.names["teacher"])
    cache.check_facts(fingerprint_teacher(loaded))
    loaded.move_to(resolve_device(config.device), dtype)
    return get_constant_head(loaded.model)


def list_parents(caches: Mapping[str, CacheFolder]) -> list[Parent]:
    """The models that made the caches, for a card."""
    return [
        Parent(role=network, name=cache.manifest.names["teacher"], digest=cache.manifest.facts.teacher, note=CACHE_NOTE)
        for network, cache in caches.items()
    ]


def describe_files(caches: Mapping[str, CacheFolder]) -> dict[str, Any]:
    """The files of the caches with their digests, which a resumed run needs again."""
    return {network: dict(cache.manifest.files) for network, cache in caches.items()}
