"""A saved student under the names that transformers 4.57 and 5, and engines built on either, read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import random_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from potstill.models.load import load_model
from potstill.models.saving import add_legacy_fields, save_model_folder

SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
DEFAULT = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.5, 1.0, 1.0, 1.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
WINDOWS: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"rope_type": "default", "rope_theta": 50.0}
PHI3_LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, **LONGROPE}

# the config of a family, and the fields by which transformers 4 knows its rotation
CASES: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama": (LlamaConfig(**SIZES, rope_parameters=DEFAULT), {"rope_theta": 100.0}),
    "llama3": (
        LlamaConfig(**SIZES, rope_parameters={**LLAMA3, "rope_theta": 100.0}),
        {"rope_theta": 100.0, "rope_scaling": LLAMA3},
    ),
    "yarn": (
        Qwen3Config(**SIZES, rope_parameters={**YARN, "rope_theta": 100.0}),
        {"rope_theta": 100.0, "rope_scaling": YARN},
    ),
    "qwen2": (Qwen2Config(**SIZES, rope_parameters=DEFAULT), {"rope_theta": 100.0}),
    "mistral": (MistralConfig(**SIZES, sliding_window=None, rope_parameters=DEFAULT), {"rope_theta": 100.0}),
    "gemma3": (
        Gemma3TextConfig(
            **SIZES,
            **WINDOWS,
            rope_parameters={"full_attention": {**LINEAR, "rope_theta": 1000.0}, "sliding_attention": LOCAL},
        ),
        {"rope_theta": 1000.0, "rope_local_base_freq": 50.0, "rope_scaling": LINEAR},
    ),
    "olmo3": (
        Olmo3Config(
            **SIZES,
            **WINDOWS,
            rope_parameters={"full_attention": {**YARN, "rope_theta": 100.0}, "sliding_attention": DEFAULT},
        ),
        {"rope_theta": 100.0, "rope_local_base_freq": 100.0, "rope_scaling": YARN},
    ),
    "phi3": (
        Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=PHI3_LONGROPE),
        {"rope_theta": 100.0, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "longrope", **LONGROPE}},
    ),
    "stablelm": (
        StableLmConfig(**SIZES, rope_parameters={**DEFAULT, "partial_rotary_factor": 0.5}),
        {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
}
LEGACY_NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("family", CASES)
def test_a_config_names_its_rotation_for_transformers_4_and_stays_the_same_for_5(family: str, tmp_path: Path) -> None:
    config, fields = CASES[family]
    config.save_pretrained(tmp_path)
    add_legacy_fields(tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert {name: saved[name] for name in LEGACY_NAMES if name in saved} == fields
    before, after = config.rope_parameters, AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {name: value for name, value in after.items() if name != "type"} == before
    assert saved["model_type"] == config.model_type


def test_a_nested_config_names_its_rotation_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"rope_parameters": DEFAULT}}))
    add_legacy_fields(tmp_path)
    assert read_json(tmp_path / "config.json")["text_config"]["rope_theta"] == 100.0


def test_a_tokenizer_is_saved_under_a_class_that_both_releases_have(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<tool>"]})
    save_model_folder(random_llama(tiny_tokenizer), tiny_tokenizer, tmp_path)
    saved = read_json(tmp_path / "tokenizer_config.json")
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<|im_start|>", "<tool>"]
    assert "extra_special_tokens" not in saved  # a list there does not open in transformers 4
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.extra_special_tokens == tiny_tokenizer.extra_special_tokens
    text = "naïve <tool> 世界<|im_end|>"
    assert reloaded(text).input_ids == tiny_tokenizer(text).input_ids
    assert reloaded.chat_template == tiny_tokenizer.chat_template


READ = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
ids, texts = torch.arange(3, 150)[None], json.loads(sys.argv[2])
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    save_file({"logits": model(ids).logits.detach()}, folder / "found.safetensors")
    (folder / "ids.json").write_text(json.dumps([tokenizer(text).input_ids for text in texts]))
print(__version__)
"""
TEXTS = (
    "The quick brown fox",
    "naïve façade, 世界 🎉",
    "<|im_start|>user\nHi<tool><|im_end|>",
    "  def f(x):\n\treturn x",
)


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57 for `PYTHONPATH`: `$POTSTILL_TRANSFORMERS_4`, or installed by pip."""
    folder = os.environ.get("POTSTILL_TRANSFORMERS_4")
    if folder:
        return Path(folder)
    target = tmp_path_factory.mktemp("transformers_4")
    packages = ("transformers==4.57.*", "huggingface-hub<1", "tokenizers<0.23")  # torch and the rest as they are here
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *packages]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("pip cannot install transformers 4.57 here; name a folder of it in POTSTILL_TRANSFORMERS_4")
    return target


@pytest.mark.slow
def test_transformers_4_gives_the_logits_and_ids_of_5(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, transformers_4: Path
) -> None:
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<tool>"]})
    models = {}
    for family, (config, _) in CASES.items():
        models[family] = AutoModelForCausalLM.from_config(config).eval()
        save_model_folder(models[family], tiny_tokenizer, tmp_path / family)
    environment = {**os.environ, "PYTHONPATH": str(transformers_4)}
    command = [sys.executable, "-c", READ, str(tmp_path), json.dumps(TEXTS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("4.57.")
    for family, model in models.items():
        found = load_file(tmp_path / family / "found.safetensors")["logits"]
        expected = load_model(tmp_path / family).model(torch.arange(3, 150)[None]).logits
        assert torch.equal(expected, model(torch.arange(3, 150)[None]).logits), family
        assert (found - expected).abs().max() < 1e-5, family
        ids = json.loads((tmp_path / family / "ids.json").read_text())
        assert ids == [tiny_tokenizer(text).input_ids for text in TEXTS], family


ASK_VLLM = """
import sys
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder = sys.argv[1]
    ids = load_file(f"{folder}-ids.safetensors")["ids"].tolist()
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=1, max_logprobs=5)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5)
    output = llm.generate({"prompt_token_ids": ids}, sampling)[0]
    gold = [row[i].logprob for i, row in zip(ids[1:], output.prompt_logprobs[1:])]
    text_ids = llm.get_tokenizer()("naïve 世界 <|im_end|>").input_ids
    save_file({"gold": torch.tensor(gold), "text_ids": torch.tensor(text_ids)}, f"{folder}-vllm.safetensors")
"""


@pytest.mark.slow
def test_vllm_gives_the_log_probabilities_of_a_saved_student(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    python = os.environ.get("POTSTILL_VLLM")
    if not python:
        pytest.skip("needs vLLM: name the Python of an environment that has it in POTSTILL_VLLM")
    sizes = SIZES | {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 64, as it wants
    config = LlamaConfig(**sizes, rope_parameters=DEFAULT)
    model = AutoModelForCausalLM.from_config(config).eval()
    save_model_folder(model, tiny_tokenizer, tmp_path / "model")
    ids = torch.randint(3, 259, (100,))
    save_file({"ids": ids}, tmp_path / "model-ids.safetensors")
    (tmp_path / "ask.py").write_text(ASK_VLLM)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that an error shows its cause
    command = [python, str(tmp_path / "ask.py"), str(tmp_path / "model")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    answer = load_file(tmp_path / "model-vllm.safetensors")
    expected = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert (answer["gold"] - expected).abs().max() < 1e-3
    assert answer["text_ids"].tolist() == tiny_tokenizer("naïve 世界 <|im_end|>").input_ids
