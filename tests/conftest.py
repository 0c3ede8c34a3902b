"""Fixtures that every floor shares: a tiny model, a tiny tokenizer, float64, the private corpora; and no network."""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

# before the libraries that read them are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pytest
import tests.annotations  # noqa: F401  it comes before the imports of potstill
import torch
from hypothesis import settings
from tests.serving import server
from tests.tiny import byte_tokenizer, random_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["server"]

settings.register_profile("potstill", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("potstill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `gpu` skips, saying so, where torch sees no accelerator."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))


def pytest_collection_finish() -> None:
    """Frees what the imports left over, and keeps the rest out of the collection with which each training begins."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_sync() -> Iterator[None]:
    """Files do not wait for the disk: a test may kill a process, but not the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for torch: sums come in one order whatever the machine, and tiny tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from seed 0, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Inside the test, tensors and models made without a dtype are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, in SmolLM2's manner: 259 ids, ChatML, `<|im_end|>` both ends a turn and pads.

    Ids 0 to 2 are `<|endoftext|>` (unknown), `<|im_start|>` (BOS) and `<|im_end|>` (EOS = pad). Any text comes back as
    it went in.
    """
    return byte_tokenizer()


@pytest.fixture
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama, always the same one: 3 layers of width 32, 4 heads on 2 key/value heads, a tied head, eval mode.

    It speaks `tiny_tokenizer`. A test that wants another shape changes a copy of `tiny_llama.config`.
    """
    return random_llama(tiny_tokenizer)


@pytest.fixture(scope="session")
def potstill_data() -> Path:
    """The folder of private corpora, `$POTSTILL_DATA`; a test that asks for it skips where there is none."""
    folder = os.environ.get("POTSTILL_DATA")
    if not folder:
        pytest.skip("POTSTILL_DATA is unset: this test reads corpora that are not part of the project")
    if not Path(folder).is_dir():
        pytest.fail(f"POTSTILL_DATA={folder} is no folder; unset it or fix it")
    return Path(folder)
