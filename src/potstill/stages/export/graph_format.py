"""Graphs for ONNX Runtime or OpenVINO, made by the exporters of transformers: one graph that reads and extends a cache.

A graph reads any number of tokens after any number of earlier ones. ONNX graphs take and return keys and values;
OpenVINO graphs hold them inside.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from potstill.core.errors import ArtifactError, UnsupportedModel
from potstill.core.screen import status
from potstill.evaluate.samples import tokenize_prompt
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.load import LoadedModel
from potstill.stages.export.greedy_check import PROMPT, Logits, compare_logits, compute_logits, get_check_length
from potstill.stages.export.shared import count_bytes

GRAPH_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
ROUNDING = 1e-3  # the largest difference of a logit, relative to the largest logit, that float32 kernels explain
SAMPLE_LENGTH = 8
Step = Callable[[dict[str, Tensor]], Any]
SNIPPETS = {
    "onnx": """```python
from transformers import AutoTokenizer
from transformers.exporters import ExportedModel

model, tokenizer = ExportedModel.from_pretrained("{name}", device="cpu"), AutoTokenizer.from_pretrained("{name}")
```

The graph takes `input_ids`, `attention_mask`, `position_ids` and `past_key_values`, and returns `logits` and the longer
`past_key_values`.""",
    "openvino": """```python
import openvino

request = openvino.Core().compile_model("{name}/openvino_model.xml", "CPU").create_infer_request()
```

The graph takes `input_ids`, `attention_mask`, `position_ids` and `beam_idx` (0, 1, ... for each text), and returns
`logits`. It holds keys and values; `request.reset_state()` empties them. OpenVINO computes in bfloat16 on CPUs that
can; `compile_model(..., {{"INFERENCE_PRECISION_HINT": "f32"}})` computes in float32.""",
}


def format_snippet(runtime: str, name: str) -> str:
    """How to open the graph in the folder `name`; empty for other formats."""
    return SNIPPETS[runtime].format(name=name) if runtime in RUNTIMES else ""


def export_graphs(loaded: LoadedModel, folder: Path, *, runtime: str, check: bool) -> dict[str, Any]:
    """Write the graph of `loaded` for a runtime with its tokenizer, in float32; the facts of the files and the check.

    Raises: UnsupportedModel where transformers cannot export the architecture; ArtifactError if the runtime writes
        other tokens.
    """
    with status(f"tracing for {RUNTIMES[runtime]}"), quiet():
        exported = trace_model(loaded.model, runtime)
        exported.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    facts = {"type": "float32", "bytes": count_bytes(folder), "architecture": str(loaded.model.config.model_type)}
    if not check:
        return {"facts": facts, "checks": []}
    with status(f"comparing with {RUNTIMES[runtime]}"), quiet():
        ids = tokenize_prompt(PROMPT, loaded.tokenizer)
        open_graph = open_onnx if runtime == "onnx" else open_openvino
        step = open_graph(folder, loaded.model)
        tokens, logits = write_greedy(step, ids, get_check_length(loaded.model, ids))
    reference = compute_logits(loaded.model, ids, tokens)
    comparison = compare_logits(RUNTIMES[runtime], tokens, logits, reference, rounding=ROUNDING)
    if not comparison.passed:
        raise ArtifactError(
            f"{RUNTIMES[runtime]} computes something else than the model ({comparison.describe()}); nothing was kept: "
            f"--no-check exports all the same, and please report this"
        )
    return {
        "facts": facts,
        "checks": [{"name": RUNTIMES[runtime], "outcome": comparison.describe(), **comparison.to_dict()}],
    }


def trace_model(model: PreTrainedModel, runtime: str) -> Any:
    """The graph of `model` for a runtime, as transformers' `ExportedModel`; texts, tokens and cache have any length.

    Raises: UnsupportedModel where transformers cannot export the architecture.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter, OpenVINOConfig, OpenVINOExporter

    if isinstance(model, PotstillForCausalLM):
        raise UnsupportedModel(
            f"transformers exports its own families to {RUNTIMES[runtime]}, and this is potstill's architecture; try "
            f"--to hf first, which finds a stock family for it"
        )
    exporter, config = (OnnxExporter, OnnxConfig) if runtime == "onnx" else (OpenVINOExporter, OpenVINOConfig)
    try:
        inputs = make_sample_inputs(model)
        exported = exporter().export(model, inputs, config(dynamic_shapes=list_dynamic_axes(inputs)))
    except Exception as error:  # the tracer and the translator raise errors of any type
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModel(
            f"transformers cannot export {model.config.model_type} models to {RUNTIMES[runtime]} ({reason[:200]}); "
            f"--to hf and --to gguf keep them"
        ) from error
    exported.generation_config = model.generation_config
    return exported


@torch.no_grad()
def make_sample_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Two tokens of two texts after four earlier ones, since the tracer takes a length of one for a constant."""
    ids = (torch.arange(2 * SAMPLE_LENGTH).view(2, -1) + 3) % model.config.get_text_config().vocab_size
    cache = DynamicCache()
    model(input_ids=ids[:, :-2], past_key_values=cache, use_cache=True)
    return {
        "input_ids": ids[:, -2:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(SAMPLE_LENGTH - 2, SAMPLE_LENGTH).expand(2, -1),
        "past_key_values": cache,
        "use_cache": True,
    }


def list_dynamic_axes(inputs: dict[str, Any]) -> dict[str, Any]:
    """The axes that vary: texts and tokens, and in the cache texts and earlier tokens."""
    auto = torch.export.Dim.AUTO
    text_axes, cache_axes = {0: auto, 1: auto}, {0: auto, 2: auto}
    axes: dict[str, Any] = {name: text_axes for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return axes | {"past_key_values": [cache_axes] * (2 * len(inputs["past_key_values"].layers))}


def write_greedy(step: Step, ids: list[int], length: int) -> tuple[list[int], Logits]:
    """`length` greedy tokens after `ids`, and the logits before each.

    `step` reads new tokens and returns the logits of the last one.
    """
    tokens: list[int] = []
    rows: list[Any] = []
    new_ids = list(ids)
    while len(tokens) < length:
        end = len(ids) + len(tokens)
        inputs = {
            "input_ids": torch.tensor([new_ids]),
            "attention_mask": torch.ones(1, end, dtype=torch.long),
            "position_ids": torch.arange(end - len(new_ids), end)[None],
        }
        rows.append(step(inputs))
        new_ids = [int(rows[-1].argmax())]
        tokens += new_ids
    return tokens, np.stack(rows)


def open_onnx(folder: Path, model: PreTrainedModel) -> Step:
    """The graph in ONNX Runtime with a cache that begins empty."""
    from transformers.exporters import ExportedModel

    graph, cache = ExportedModel.from_pretrained(folder, device="cpu"), make_empty_cache(model)

    def step(inputs: dict[str, Tensor]) -> Any:
        nonlocal cache
        outputs = graph(**inputs, past_key_values=cache)
        cache = outputs.past_key_values
        return outputs.logits[0, -1].numpy().copy()

    return step


def open_openvino(folder: Path, model: PreTrainedModel) -> Step:
    """The graph in OpenVINO, which holds its cache."""
    import openvino

    del model
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # else a CPU with bfloat16 products rounds to them
    graph = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", options)
    request = graph.create_infer_request()
    names = {name for port in graph.inputs for name in port.get_names()}

    def step(inputs: dict[str, Tensor]) -> Any:
        values = {name: tensor.numpy() for name, tensor in inputs.items()} | {"beam_idx": np.zeros(1, np.int32)}
        outputs = request.infer({name: value for name, value in values.items() if name in names})
        return outputs["logits"][0, -1].copy()

    return step


@torch.no_grad()
def make_empty_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache of no tokens that knows its shapes."""
    cache = DynamicCache()
    model(input_ids=torch.tensor([[3]]), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    return cache


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the messages of the tracer, which are for developers of exporters."""
    loggers = [logging.getLogger(name) for name in ("torch", "transformers", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
