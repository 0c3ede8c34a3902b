"""Digests of a model and of a tokenizer, which identify the teacher of a cache."""

import hashlib
import json

from transformers import PreTrainedTokenizerBase

from potstill.models.load import LoadedModel

# Keys of a config that do not describe the network.
IGNORED_CONFIG_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")


def fingerprint_teacher(teacher: LoadedModel) -> dict[str, str]:
    """The digests of a teacher's weights, and of the part of its config that describes the network."""
    config = {
        name: value for name, value in teacher.model.config.to_diff_dict().items() if name not in IGNORED_CONFIG_KEYS
    }
    config_json = json.dumps(config, sort_keys=True, default=str)
    return {"teacher": teacher.digest, "config": hashlib.sha256(config_json.encode()).hexdigest()}


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The digests of a tokenizer with its BOS and EOS ids, and of its chat template."""
    description = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    return {
        "tokenizer": hashlib.sha256(description.encode()).hexdigest(),
        "template": hashlib.sha256(_write_template(tokenizer).encode()).hexdigest(),
    }


def _write_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, or several named ones as JSON; empty without any."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else json.dumps(dict(template), sort_keys=True)
