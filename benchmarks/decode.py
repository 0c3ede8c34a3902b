"""Decoding on the CPU: tokens per second of potstill, of Hugging Face's `generate`, and of the memory's own speed.

The prompts are the first turns of the Vicuna questions and of MT-bench, rendered by the model's chat template. Each
side writes the same number of tokens to each prompt, greedily and past stop tokens. Rates count new tokens without the
prompt. The sides take turns in one process, so that a busy machine slows all of them. On a machine that others use,
`OMP_NUM_THREADS=1` with `--cpu-seconds` compares one thread's processor time.

The floor is the time in which this machine reads the weights once: bytes of all matrices that a token needs, over the
fastest sum or maximum of a large buffer. `verify` is the time of a pass over several tokens, relative to a pass over
one. `--draft MODEL` adds a draft model, here and in Hugging Face's assisted generation. `--peer NAME=URL` adds a server
of the OpenAI protocol that runs already, such as vLLM's or llama-cpp-python's.

    python benchmarks/decode.py --json --prompts $POTSTILL_DATA/instruct/lm-sys__FastChat/fastchat/llm_judge/data
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.engine import Engine
from potstill.decode.quantization import measure_quantization
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.evaluate.pass_times import time_passes
from potstill.models.load import LoadedModel, load_model
from setting.document import command_line, document, parse_arguments, refuse_on_red
from setting.peer import Writer, make_hf_writer, make_server_writer

RESTS_ON = ["tests/decode"]
SETS = ("vicuna_bench", "mt_bench")
BUFFER_BYTES = 2**29
WIDTHS = (1, 2, 4, 8, 16)
BATCHES = (1, 4, 16)
FLOOR_GOAL = "plain decoding at 0.6 of the floor or more"
PEER_GOAL = "plain decoding 2.5 times Hugging Face's generate or more"
DRAFTS_GOAL = "the best lossless decoding 4 times Hugging Face's generate or more, on each set of prompts"
LOOKUP_LENGTH = 10  # Hugging Face's own number of tokens of its prompt lookup


def main() -> None:
    """Refuses if a test fails, measures every side on both sets of prompts, prints one document."""
    options = parse_options()
    if not options.unchecked:
        refuse_on_red(RESTS_ON)
    loaded = load_model(options.model, dtype=torch.bfloat16)
    loaded.model.eval()
    prompts = {name: read_prompts(loaded, options.prompts, name, options.count) for name in SETS}
    floor = measure_floor(loaded.model)
    writers = make_writers(loaded, options)
    rates = {name: measure_rates(writers, chosen, options) for name, chosen in prompts.items()}
    batches = {str(batch): measure_batch(loaded, prompts[SETS[1]], batch, options.tokens) for batch in BATCHES}
    plain = statistics.median(rates[name]["potstill bf16"] for name in SETS)
    peer = statistics.median(rates[name]["Hugging Face bf16"] for name in SETS)
    best = {name: max(rate for side, rate in rates[name].items() if side.startswith("potstill bf16")) for name in SETS}
    share = plain / floor["tokens per second"]
    figures: dict[str, Any] = {
        "floor": floor,
        "tokens per second": rates,
        "share of the floor": share,
        "times Hugging Face": {
            name: {side: rate / sides["Hugging Face bf16"] for side, rate in sides.items()}
            for name, sides in rates.items()
        },
        "tokens per second of a batch": batches,
        "verify": {"bf16": measure_passes(loaded, quantize=False), "int8": measure_passes(loaded, quantize=True)},
        "int8": measure_divergence(loaded, prompts[SETS[1]]),
    }
    met = {FLOOR_GOAL: share >= 0.6, PEER_GOAL: plain / peer >= 2.5}
    met[DRAFTS_GOAL] = all(best[name] >= 4 * rates[name]["Hugging Face bf16"] for name in SETS)
    print(document("decode", figures, met))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    data = os.environ.get("POTSTILL_DATA", "")
    folder = Path(data) / "instruct/lm-sys__FastChat/fastchat/llm_judge/data"
    parser.add_argument("--model", default="smollm2", help="the model (default smollm2)")
    parser.add_argument("--prompts", type=Path, default=folder, help="folder of FastChat's question sets")
    parser.add_argument("--count", type=int, default=5, help="prompts of each set (default 5)")
    parser.add_argument("--draft", help="a smaller model with the same tokenizer")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="a server that runs")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per prompt (default 48)")
    return parse_arguments(parser)


def read_prompts(loaded: LoadedModel, folder: Path, name: str, count: int) -> list[list[int]]:
    """The token ids of the first turns of a question set, evenly spread over it."""
    lines = (folder / name / "question.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["turns"][0] for line in lines[:: max(1, len(lines) // count)]][:count]
    return [
        list(
            loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
        )
        for question in questions
    ]


def measure_floor(model: PreTrainedModel) -> dict[str, float]:
    """Bytes of the matrices that every token reads, bytes per second of memory, and their ratio."""
    matrices = {weight.data_ptr(): weight for weight in model.parameters() if weight.ndim == 2}
    if not model.config.tie_word_embeddings:
        matrices.pop(model.get_input_embeddings().weight.data_ptr())
    size = sum(weight.numel() * weight.element_size() for weight in matrices.values())
    buffer = torch.ones(BUFFER_BYTES // 4)
    seconds = min(time_call(read) for read in (buffer.sum, buffer.max) for _ in range(7))
    return {
        "bytes": size,
        "bytes per second": BUFFER_BYTES / seconds,
        "tokens per second": BUFFER_BYTES / seconds / size,
    }


def time_call(call: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def make_writers(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Writer]:
    """Every side by name: it writes a number of tokens to each prompt."""
    single = copy.deepcopy(loaded.model).float()
    writers = {
        "potstill bf16": make_own_writer(loaded, loaded.model),
        "potstill bf16, lookup": make_own_writer(loaded, loaded.model, draft="lookup"),
        "potstill bf16, suffix": make_own_writer(loaded, loaded.model, draft="suffix"),
        "potstill int8": make_own_writer(loaded, loaded.model, quantize=True),
        "potstill float32": make_own_writer(loaded, single),
        "Hugging Face bf16": make_hf_writer(loaded.model),
        "Hugging Face bf16, lookup": make_hf_writer(loaded.model, prompt_lookup_num_tokens=LOOKUP_LENGTH),
        "Hugging Face float32": make_hf_writer(single),
    }
    if options.draft:
        draft = load_model(options.draft, dtype=torch.bfloat16).model.eval()
        writers["potstill bf16, draft"] = make_own_writer(loaded, loaded.model, draft=options.draft)
        writers["Hugging Face bf16, assisted"] = make_hf_writer(loaded.model, assistant_model=draft)
    for peer in options.peer:
        name, _, url = peer.partition("=")
        writers[name] = make_server_writer(url, loaded.tokenizer)
    return writers


def make_own_writer(
    loaded: LoadedModel,
    model: PreTrainedModel,
    *,
    slots: int = 1,
    quantize: bool = False,
    draft: str | None = None,
) -> Writer:
    """potstill's loop, greedy, with a drafter of `--draft` or without."""
    runner = ModelRunner(model, vocabulary=loaded.vocabulary, slots=slots, quantize=quantize)
    speculation = make_speculation(runner, loaded.tokenizer, DraftOptions(draft=draft))
    sampling = Sampling(vocabulary=loaded.vocabulary, stop=frozenset(), temperature=0.0)

    def write(prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        engine = Engine(runner, speculation=speculation)
        for prompt in prompts:
            engine.add(DecodeRequest(prompt=prompt, max_new_tokens=tokens, sampling=sampling))
        return [completion.tokens for _, completion in sorted(engine.run().items())]

    return write


def measure_rates(
    writers: dict[str, Writer], prompts: Sequence[list[int]], options: argparse.Namespace
) -> dict[str, float]:
    """New tokens per second of each side: the median over prompts, which all sides answer in turn.

    Each side reads a prompt once before it is timed, since servers keep the keys and values of the last prompt.
    """
    rates: dict[str, list[float]] = {name: [] for name in writers}
    for prompt in prompts:
        for name, write in writers.items():
            write([prompt], 1)
            seconds = [time_call(write, [prompt], n) for n in (1, options.tokens + 1)]
            rates[name].append(options.tokens / (seconds[1] - seconds[0]))
    return {name: statistics.median(values) for name, values in rates.items()}


def measure_batch(loaded: LoadedModel, prompts: Sequence[list[int]], batch: int, tokens: int) -> float:
    """New tokens per second of potstill in bf16 with `batch` texts at a time."""
    write = make_own_writer(loaded, loaded.model, slots=batch)
    texts = [prompts[n % len(prompts)] for n in range(batch)]
    seconds = [time_call(write, texts, n) for n in (1, tokens + 1)]
    return batch * tokens / (seconds[1] - seconds[0])


def measure_passes(loaded: LoadedModel, *, quantize: bool) -> dict[str, float]:
    """The time of a pass over several new tokens, relative to one, behind 128 tokens of text."""
    runner = ModelRunner(loaded.model, vocabulary=loaded.vocabulary, quantize=quantize)
    seconds = time_passes(runner, range(5, 133), WIDTHS, runs=12)
    return {"milliseconds": 1e3 * seconds[1], **{str(width): seconds[width] / seconds[1] for width in WIDTHS}}


def measure_divergence(loaded: LoadedModel, prompts: Sequence[list[int]]) -> dict[str, float]:
    """Mean KL of int8 from bf16 on the prompts, in nats per token, and the share of equal likeliest tokens."""
    pairs = [measure_quantization(loaded.model, prompt, vocabulary=loaded.vocabulary) for prompt in prompts]
    divergences, agreements = (torch.cat(values) for values in zip(*pairs, strict=True))
    return {"KL": float(divergences.mean()), "agreement": float(agreements.mean()), "tokens": len(divergences)}


if __name__ == "__main__":
    main()
