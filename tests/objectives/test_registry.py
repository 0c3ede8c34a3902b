"""Every method by name: built from two whole networks, trained in a study, invariant where it must be."""

import copy
from collections.abc import Mapping

import pytest
import torch
from tests.data.trained import byte_level, sentencepiece
from tests.objectives.crossed import batch_of as crossed_batch
from tests.objectives.crossed import llama, taught
from tests.objectives.enumerated import ALIKE_METHODS
from tests.objectives.test_invariants import batch_of, gradients
from tests.tiny import byte_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from potstill.core.errors import UsageError, VocabularyMismatch
from potstill.core.types import EDIT_ALIGNED_PAIRS
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.mined import invert_nearest_ids
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.train.optimizer import parameter_groups
from potstill.train.training_module import TrainingModule


def larger(model: LlamaForCausalLM, seed: int = 7) -> LlamaForCausalLM:
    """A teacher of another width."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**model.config.to_dict(), "hidden_size": 48, "num_hidden_layers": 2})
    return LlamaForCausalLM(config).eval()


def study_of(student: LlamaForCausalLM, teacher: LlamaForCausalLM, name: str, share: float = 0.0) -> TrainingModule:
    tokenizer = byte_tokenizer()
    sides = PairInfo(ModelInfo(student, tokenizer), ModelInfo(teacher, tokenizer))
    torch.manual_seed(0)
    objective = ObjectiveConfig.parse(name, cross_entropy=share, temperature=1.0).build(sides)
    assert isinstance(objective, torch.nn.Module)
    return TrainingModule(student, objective.to(student.dtype), frozen={"teacher": teacher})


@pytest.fixture
def pair(tiny_llama: LlamaForCausalLM) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    return tiny_llama.double(), larger(tiny_llama).double()


@pytest.mark.parametrize("name", ALIKE_METHODS)
def test_a_method_trains_the_student_and_its_own_weights_and_never_the_teacher(
    name: str, pair: tuple[LlamaForCausalLM, LlamaForCausalLM]
) -> None:
    student, teacher = pair
    study = study_of(student, teacher, name, share=0.5)
    found = gradients(study, batch_of(9, 5, 14))
    own = {key for key, _ in study.named_parameters() if key.startswith("objective.")}
    assert own <= found.keys()
    assert all(found[key].any() for key in own)
    assert any(g.any() for key, g in found.items() if key.startswith("student."))
    assert all(p.grad is None for p in teacher.parameters())
    groups = parameter_groups(study.student, study.objective, rate=1e-3, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups if "decay" not in group["name"]) == len(own)


@pytest.mark.parametrize("name", ["uld", "mined", "spans", "tie_kd", "dskdv2", "dskdv2_eta"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name: str, tiny_llama: LlamaForCausalLM) -> None:
    student = tiny_llama.double()
    study, batch = study_of(student, copy.deepcopy(student), name), batch_of(9, 5, 14)
    found = {key: g for key, g in gradients(study, batch).items() if key.startswith("student.")}
    sums = dict(zip(study.term_names, study(**batch)["sums"].tolist(), strict=True))
    assert all(abs(value) < 1e-10 for key, value in sums.items() if not key.endswith("_projector"))
    assert max(g.abs().max().item() for g in found.values()) < 1e-10


@pytest.mark.parametrize("name", ALIKE_METHODS)
def test_a_method_gives_documents_together_what_it_gives_them_apart(
    name: str, pair: tuple[LlamaForCausalLM, LlamaForCausalLM]
) -> None:
    whole = batch_of(9, 5, 14)
    whole["sampled"] = whole["documents"] == 2  # one document: a policy's advantages are whitened over all that are
    study, parts = taught(study_of(*pair, name), whole), [one_of(whole, i) for i in range(3)]
    counts = study.counts(whole)
    assert (counts > 0).all()
    assert torch.equal(counts, sum((study.counts(part) for part in parts), torch.zeros_like(counts)))
    together = gradients(study, whole, counts)
    apart: dict[str, Tensor] = {}
    for part in parts:
        for key, g in gradients(study, part, counts).items():
            apart[key] = apart.get(key, torch.zeros_like(g)) + g
    assert together.keys() == apart.keys()
    for key, g in together.items():
        torch.testing.assert_close(g, apart[key], rtol=1e-5, atol=1e-6)


def one_of(batch: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One document of a packed batch, as a batch."""
    inside = batch["documents"][0] == number
    found = {key: tensor[:, inside] for key, tensor in batch.items()}
    return {**found, "documents": torch.zeros_like(found["documents"])}


def test_a_method_needs_both_networks() -> None:
    with pytest.raises(UsageError, match="give a teacher on this machine"):
        ObjectiveConfig(name="dskd").build()


@pytest.mark.parametrize("text", ["tie_kd:k=0", "hidden:layers=2.5", "relations:heads=-1", "hidden:layers=nan"])
def test_an_option_that_counts_is_a_whole_number(text: str, tiny_llama: LlamaForCausalLM) -> None:
    sides = PairInfo(ModelInfo(tiny_llama, byte_tokenizer()), ModelInfo(larger(tiny_llama), byte_tokenizer()))
    with pytest.raises(UsageError, match="choose a whole number"):
        ObjectiveConfig.parse(text, cross_entropy=0.0, temperature=1.0).build(sides)


def test_hidden_states_are_compared_at_the_layers_of_a_map(tiny_llama: LlamaForCausalLM) -> None:
    sides = PairInfo(ModelInfo(tiny_llama, byte_tokenizer()), ModelInfo(larger(tiny_llama), byte_tokenizer()))
    mixed = ObjectiveConfig.parse("hidden:map=0-1/3-2/1-2", cross_entropy=0.0, temperature=1.0)
    ((_, own),) = mixed.build(sides).parts  # type: ignore[attr-defined]
    assert own.layers == ((0, 1), (3, 2), (1, 2))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hidden:map=2", "is not STUDENT-TEACHER"),
        ("hidden:map=a-b", "is not STUDENT-TEACHER"),
        ("hidden:map=4-1", "the student has the layers 0 .its embeddings. to 3, and the map names 4"),
        ("hidden:map=1-3", "the teacher has the layers 0 .its embeddings. to 2, and the map names 3"),
        ("relations:map=1-1", "relations has no option 'map'"),
    ],
)
def test_a_map_of_layers_that_are_not_there_is_refused(text: str, said: str, tiny_llama: LlamaForCausalLM) -> None:
    sides = PairInfo(ModelInfo(tiny_llama, byte_tokenizer()), ModelInfo(larger(tiny_llama), byte_tokenizer()))
    with pytest.raises(UsageError, match=said):
        ObjectiveConfig.parse(text, cross_entropy=0.0, temperature=1.0).build(sides)


def test_a_method_for_one_tokenizer_is_refused_between_two_with_one_that_works(tiny_llama: LlamaForCausalLM) -> None:
    other = byte_tokenizer(ascii=True)
    student = copy.deepcopy(tiny_llama)
    sides = PairInfo(ModelInfo(student, byte_tokenizer()), ModelInfo(tiny_llama, other))
    with pytest.raises(VocabularyMismatch, match="--objective dskdv2_eta"):
        ObjectiveConfig(name="dskd").build(sides)
    assert ObjectiveConfig(name="dskdv2_eta").build(sides)


def test_the_same_strings_are_found_whatever_their_ids(tiny_llama: LlamaForCausalLM) -> None:
    ours, theirs = byte_tokenizer(), byte_tokenizer(ascii=True)
    sides = PairInfo(ModelInfo(tiny_llama, ours), ModelInfo(tiny_llama, theirs))
    same = sides.shared_token_ids
    assert same.shape[1] > 100
    for mine, yours in same.T.tolist():
        assert ours.convert_ids_to_tokens(mine) == theirs.convert_ids_to_tokens(yours)


def test_between_two_vocabularies_each_id_has_one_counterpart_and_no_byte_fallback_where_there_is_a_token(
    tiny_llama: LlamaForCausalLM,
) -> None:
    sides = PairInfo(ModelInfo(tiny_llama, byte_level()), ModelInfo(tiny_llama, sentencepiece(scheme="never")))
    ours, theirs = sides.shared_token_ids
    assert len(ours.unique()) == len(theirs.unique()) == len(ours)
    of, raw = sides.teacher.pieces.by_id, sides.teacher.pieces.byte_fallback_ids
    written = {text for i, text in enumerate(of) if text and i not in raw}
    assert not [j for j in theirs.tolist() if j in raw and of[j] in written]
    source = invert_nearest_ids(sides.nearest_ids, sides.student.vocab_size)
    assert not [j for j in source.tolist() if j in raw and of[j] in written]


def test_edit_distance_takes_nothing_that_the_student_wrote_for_the_truth(tiny_llama: LlamaForCausalLM) -> None:
    ours, theirs = byte_level(), sentencepiece(scheme="never")
    student, teacher = llama(ours, 32, 1).double(), llama(theirs, 48, 2).double()
    objective = ObjectiveConfig(name="mined", cross_entropy=0.0).build(
        PairInfo(ModelInfo(student, ours), ModelInfo(teacher, theirs))
    )
    study = TrainingModule(student, objective, frozen={"teacher": teacher})
    batch = crossed_batch(["The quick brown fox jumps over the lazy dog."], ours, theirs)
    batch |= {EDIT_ALIGNED_PAIRS: torch.empty(2, 0, dtype=torch.long)}
    sampled = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    assert study(**batch)["loss"].item() > 0
    assert study(**batch, sampled=sampled)["loss"].item() == 0
    assert objective.counts({**batch, "sampled": sampled}) == {"mined": 0}
