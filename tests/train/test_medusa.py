"""Medusa's loss: the definition on packed documents, a frozen target, and a checkpoint of the heads alone."""

from pathlib import Path

import pytest
import torch
from tests.tiny import CYCLE, counting_llama
from tests.train.small import settings, some_packs
from torch.nn.functional import cross_entropy, silu
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.types import IGNORE, Batch
from potstill.data.packing import collate, pack
from potstill.data.token_dataset import TokenizedDocument
from potstill.decode.drafters.medusa import MedusaHeads
from potstill.evaluate.draft_matches import match_heads
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.evaluate.target_text import write_target_rows
from potstill.models.load import LoadedModel
from potstill.train.medusa import MedusaLoss, MedusaNetwork, shift_targets
from potstill.train.run import train
from potstill.train.training_module import TrainingModule


def make_module(target: LlamaForCausalLM, *, num_heads: int = 3) -> TrainingModule:
    heads = MedusaHeads(target.config.hidden_size, num_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for weight in heads.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    return TrainingModule(MedusaNetwork(heads, target), MedusaLoss(num_heads=num_heads, decay=0.5))


def batch_of_documents() -> Batch:
    """Three documents; the first is shorter than the heads reach, and the third has an untrained gap."""
    lengths, generator = [3, 9, 12], torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (sum(lengths),), generator=generator)
    labels = ids.clone()
    labels[[0, 3, 12, 17]] = IGNORE
    return collate([{"input_ids": ids, "labels": labels, "lengths": torch.tensor(lengths)}])


def test_the_loss_is_its_definition_and_its_gradient_reaches_the_heads_alone(tiny_llama: LlamaForCausalLM) -> None:
    target, batch = tiny_llama.double(), batch_of_documents()
    module = make_module(target).double()
    module(**batch)["loss"].backward()
    heads = module.student.heads
    gradients = [weight.grad.clone() for weight in heads.parameters()]
    heads.zero_grad()
    expected, start = torch.zeros((), dtype=torch.float64), 0
    counts, sums = [0, 0, 0], [torch.zeros((), dtype=torch.float64)] * 3
    for length in (3, 9, 12):
        ids, labels = batch["input_ids"][0, start : start + length], batch["labels"][0, start : start + length]
        hidden = target.model(ids[None]).last_hidden_state[0].detach()
        for k in (1, 2, 3):
            for n in range(length - 1 - k):
                if bool((labels[n + 1 : n + 2 + k] != IGNORE).all()):
                    block = heads.blocks[k - 1]
                    logits = target.lm_head(hidden[n] + silu(block(hidden[n])))
                    sums[k - 1] = sums[k - 1] + cross_entropy(logits, ids[n + 1 + k])
                    counts[k - 1] += 1
        start += length
    for k in (1, 2, 3):
        expected = expected + 0.5**k * sums[k - 1] / counts[k - 1]
    expected.backward()
    torch.testing.assert_close(module(**batch)["loss"], expected)
    for weight, gradient in zip(heads.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, weight.grad)
    assert module.counts(batch).tolist() == counts


def test_heads_begin_as_the_targets_own_prediction(tiny_llama: LlamaForCausalLM) -> None:
    hidden = torch.randn(5, tiny_llama.config.hidden_size)
    assert all(torch.equal(states, hidden) for states in MedusaHeads(tiny_llama.config.hidden_size, 2)(hidden))


@pytest.mark.parametrize("shift", [1, 5, 40])
def test_a_shift_beyond_the_text_has_no_target(shift: int) -> None:
    batch = batch_of_documents()
    has_target, targets = shift_targets(batch, shift)
    assert int(has_target.sum()) == len(targets)
    assert (len(targets) == 0) == (shift == 40)


def test_a_run_trains_the_heads_only_and_its_checkpoints_hold_no_target(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
    module = make_module(tiny_llama)
    heads = [weight.clone() for weight in module.student.parameters()]
    options = settings()
    train(module, some_packs(), options, tmp_path, show=False)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_llama.state_dict().items())
    assert not any(torch.equal(a, b) for a, b in zip(heads, module.student.parameters(), strict=True))
    assert not list(tmp_path.rglob("model.safetensors"))
    again = make_module(tiny_llama)
    train(again, some_packs(), options, tmp_path, resume=True, show=False)
    assert all(map(torch.equal, again.student.parameters(), module.student.parameters()))


def test_training_on_the_targets_own_text_raises_the_accuracy_on_text_that_it_did_not_see(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = counting_llama(tiny_tokenizer)
    loaded = LoadedModel(model, tiny_tokenizer, "target", tmp_path, None, "")
    rows = write_target_rows(loaded, [[n, n + 1] for n in CYCLE[:-1]], max_new_tokens=40)
    documents = [TokenizedDocument(list(row.input_ids), list(row.labels)) for row in rows[::2]] * 4
    module = TrainingModule(MedusaNetwork(MedusaHeads(model.config.hidden_size, 2), model), MedusaLoss(num_heads=2))

    def list_accuracies() -> list[float]:
        return match_heads(module.student.heads, model, rows[1::2], ScoringConfig(context=64)).shares

    assert list_accuracies() == [0.0, 0.0]  # heads that predict the next token
    options = settings(tokens=60 * 256, context=64, batch_tokens=256, micro_tokens=256, save_every=0)
    train(module, pack(documents, length=64), options, tmp_path / "run", show=False)
    assert min(list_accuracies()) > 0.9
