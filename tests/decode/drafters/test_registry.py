"""What `--draft`, `--draft-length` and `--tree` mean, and what is refused in one sentence."""

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.decode.drafters.targets import draft_tokenizer, make_draft, make_runner, make_target, target_tokenizer
from tests.decode.families import make_model
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from potstill.core.errors import (
    ArtifactError,
    NotFound,
    PotstillError,
    UnsupportedModel,
    UsageError,
    VocabularyMismatch,
)
from potstill.decode.draft_length import CostLength, FixedLength
from potstill.decode.drafters.draft_vocabulary import DRAFT_VOCABULARY_FILE
from potstill.decode.drafters.drafter import DraftContext
from potstill.decode.drafters.eagle import FeatureDraft
from potstill.decode.drafters.layer_skip import list_skipped
from potstill.decode.drafters.medusa import MedusaHeads
from potstill.decode.drafters.options import DraftOptions
from potstill.decode.drafters.registry import (
    find_drafter,
    make_speculation,
    parse_draft_length,
    parse_tree,
)
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.decode.speculative import Speculation
from potstill.models.layer_view import count_layers, keep_layers
from potstill.ops.acceptance import best_draft_length


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def speculate(
    draft: str, *, length: str | None = None, tree: str | None = None, model: PreTrainedModel | None = None
) -> Speculation:
    runner = make_runner(make_target("llama") if model is None else model)
    options = DraftOptions(draft=draft, draft_length=length, tree=tree)
    speculation = make_speculation(runner, target_tokenizer(), options)
    assert speculation is not None
    return speculation


@pytest.mark.parametrize(
    ("draft", "name", "argument"),
    [
        ("lookup", "lookup", ""),
        ("skip:3,5-8", "skip", "3,5-8"),
        ("translated:smollm2", "translated", "smollm2"),
        ("smollm2", "model", "smollm2"),
        ("model:lookup", "model", "lookup"),
        ("C:/models/small", "model", "C:/models/small"),
    ],
)
def test_a_draft_is_a_drafter_with_its_argument_or_a_model(draft: str, name: str, argument: str) -> None:
    spec, found_argument = find_drafter(draft)
    assert (spec.name, found_argument) == (name, argument)


def test_a_draft_length_is_a_number_or_how_it_is_found() -> None:
    assert parse_draft_length("7") == (FixedLength(7), 0.0)
    assert parse_draft_length("confidence") == (FixedLength(8), 0.4)
    assert parse_draft_length("confidence:0.25") == (FixedLength(8), 0.25)
    assert parse_draft_length("cost:9") == (CostLength(9), 0.0)
    assert parse_tree("4,2,1") == (4, 2, 1)


@pytest.mark.parametrize(
    ("draft", "length", "tree", "words"),
    [
        ("skip", None, None, "write --draft skip:LAYERS"),
        ("lookup:3", None, None, "write --draft lookup"),
        ("lookup", "0", None, "at least 1"),
        ("lookup", "confidence:2", None, "confidence:0.4"),
        ("lookup", "confidence", None, "no probabilities"),
        ("lookup", None, "2,1", "omit --tree"),
        ("exit:1", None, "2,x", "such as 4,2,1"),
        ("exit:1", None, "9,9", "90 nodes"),
        ("exit:1", "cost", "2,1", "omit --tree"),
        ("exit:2", None, None, "from 1 to 1"),
        ("skip:7", None, None, "layers are 0 to 1"),
        ("skip:0-1", None, None, "leave at least one"),
        ("skip:x", None, None, "such as skip:3,5-8"),
        ("skip:1.5", None, None, "between 0 and 1"),
        ("skip:0.5", None, None, "none of the 2 layers"),
        ("lookup", "600", None, "does not fit in the 512 tokens"),
        ("medusa:nowhere", None, None, "medusa heads"),
        ("no such model", None, None, "no such model"),
    ],
)
def test_options_that_are_no_draft_are_refused_with_what_to_give(
    draft: str, length: str | None, tree: str | None, words: str
) -> None:
    with pytest.raises(PotstillError) as error:
        speculate(draft, length=length, tree=tree)
    assert words in str(error.value)


def test_a_draft_with_another_vocabulary_is_refused_with_the_drafter_that_takes_it(tmp_path: Path) -> None:
    draft = save(make_target("llama", vocabulary=len(draft_tokenizer())), draft_tokenizer(), tmp_path)
    with pytest.raises(VocabularyMismatch, match=f"--draft translated:{draft}"):
        speculate(draft)
    assert speculate(f"translated:{draft}").length == FixedLength(4)


def test_a_draft_as_large_as_the_target_is_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draft = save(make_draft(make_target("llama")), target_tokenizer(), tmp_path)
    with caplog.at_level(logging.WARNING, "potstill"):
        speculate(draft)
    assert "choose a draft 10 to 20 times smaller" in caplog.text


@pytest.mark.parametrize("prefix", ["", "translated:"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_proposes_the_tokens_of_its_vocabulary_alone(prefix: str, temperature: float, tmp_path: Path) -> None:
    draft = save(make_draft(make_target("llama")), target_tokenizer(), tmp_path)
    (tmp_path / DRAFT_VOCABULARY_FILE).write_text("[90, 70]")
    drafter = speculate(prefix + draft, tree=None if prefix else "3,2,1").drafter
    sampling = Sampling(vocabulary=len(target_tokenizer()), stop=frozenset(), temperature=temperature)
    noise = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    context = DraftContext(slot=0, ids=[40, 41, 42], limit=20, depth=4, sampling=sampling, noise=noise)
    drafter.start(0, [40, 41])
    proposal = drafter.propose(context)
    assert {*proposal.tokens} <= {90, 70}
    if not prefix:  # two tokens are all children that a node of three can have
        assert proposal.parents[:6] == [-1, -1, 0, 0, 1, 1]
        assert len(proposal.tokens) == 10


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[1, 1]", "[-1]", "[999]", "[1.5]", "[true]", '["1"]'])
def test_a_damaged_draft_vocabulary_is_refused_in_one_sentence(content: str, tmp_path: Path) -> None:
    draft = save(make_target("llama"), target_tokenizer(), tmp_path)
    (tmp_path / DRAFT_VOCABULARY_FILE).write_text(content)
    with pytest.raises(ArtifactError, match=r"no list of different token ids below 131; .* or delete the file"):
        speculate(draft)


@pytest.mark.parametrize(("family", "tree", "words"), [("mamba", None, "omit --draft"), ("bloom", "2,1", "no tree")])
def test_a_state_that_cannot_go_back_verifies_no_draft(family: str, tree: str | None, words: str) -> None:
    runner = ModelRunner(make_model(family), vocabulary=97, slots=1, context=64)
    options = DraftOptions(draft="suffix", draft_length=None if tree else "4", tree=tree)
    with pytest.raises(UnsupportedModel, match=words):
        make_speculation(runner, target_tokenizer(), options)


def test_heads_come_back_from_their_folder_and_fit_their_model_only(tmp_path: Path) -> None:
    heads = MedusaHeads(32, 2)
    draft = FeatureDraft(hidden=32, num_heads=4, intermediate=48, context=512)
    for module in (heads, draft):
        for weight in module.parameters():
            torch.nn.init.normal_(weight)
    heads.save(tmp_path / "medusa")
    draft.save(tmp_path / "eagle")
    for module, loaded in (
        (heads, MedusaHeads.load(tmp_path / "medusa")),
        (draft, FeatureDraft.load(tmp_path / "eagle")),
    ):
        for (name, weight), (other_name, other) in zip(
            module.state_dict().items(), loaded.state_dict().items(), strict=True
        ):
            assert name == other_name
            assert torch.equal(weight, other)
    with pytest.raises(ArtifactError, match="holds no eagle heads"):
        FeatureDraft.load(tmp_path / "medusa")
    with pytest.raises(NotFound, match=r"has no draft\.json"):
        MedusaHeads.load(tmp_path)
    MedusaHeads(16, 2).save(tmp_path / "narrow")
    with pytest.raises(ArtifactError, match="of width 16"):
        speculate(f"medusa:{tmp_path / 'narrow'}")
    assert speculate(f"medusa:{tmp_path / 'medusa'}").drafter.takes_hidden


@pytest.mark.parametrize(
    ("argument", "layers"),
    [("3,5-7", [3, 5, 6, 7]), ("0.5", [2, 4, 6, 8]), ("0.25", [4, 8]), ("0.75", [2, 3, 4, 6, 7, 8])],
)
def test_a_share_of_layers_is_spread_over_the_inner_ones(argument: str, layers: list[int]) -> None:
    assert list_skipped(argument, 10) == layers


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "potstill"])
def test_a_model_of_some_layers_computes_what_those_layers_compute(family: str) -> None:
    model = make_model(family)
    num_layers = count_layers(model)
    view = keep_layers(model, [num_layers - 1])
    ids = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 23, 29]])
    with torch.no_grad():
        before, alone = model(ids).logits, view(ids, use_cache=False).logits
        assert not torch.allclose(before, alone)
        assert torch.equal(model(ids).logits, before)
        whole = keep_layers(model, range(num_layers))(ids, use_cache=False).logits
    torch.testing.assert_close(whole, before)
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in view.parameters()} <= shared
    assert count_layers(view) == 1


def test_the_last_layer_alone_equals_a_model_with_only_that_layer() -> None:
    model = make_target("llama")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    short = LlamaForCausalLM(config).eval()
    weights = {
        name.replace("layers.1.", "layers.0."): weight
        for name, weight in model.state_dict().items()
        if "layers.0." not in name
    }
    short.load_state_dict(weights)
    ids = torch.tensor([[3, 5, 7, 11]])
    with torch.no_grad():
        torch.testing.assert_close(
            keep_layers(model, [1])(ids, use_cache=False).logits, short(ids, use_cache=False).logits
        )
    with pytest.raises(UsageError, match="layer 5 does not exist"):
        keep_layers(model, [5])


def test_the_length_by_cost_is_that_of_the_measured_times() -> None:
    length = CostLength(8)
    assert length.choose() == 0
    length.record_seconds(draft=0.0, verify=1.0, length=0)
    assert length.choose() == 8
    for kept in [min(int(count), 8) for count in np.random.default_rng(0).geometric(0.2, 400) - 1]:
        length.record(8, kept)
        length.record_seconds(draft=8 * 0.05, verify=1.0, length=8)
    assert length.choose() == best_draft_length(0.8, 0.05, longest=8) == 8
    for _ in range(400):
        length.record(8, 2)
    assert length.choose() == 2  # the third token is never kept
    for _ in range(400):
        length.record(1, 0)
        length.record_seconds(draft=0.05, verify=1.0, length=1)
    assert length.choose() == 0
    assert 1 in [length.choose() for _ in range(80)]
