"""Every recipe, by enumeration: its tiny form runs, and it says where it comes from."""

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from tests.data.trained import byte_level
from tests.stages.world import saved, written
from tests.tiny import random_llama
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.cli.commands import run as cli
from potstill.core.errors import NotFound, UsageError
from potstill.models.load import load_model
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.registry import OBJECTIVE_SPECS
from potstill.objectives.spec import DIVERGENCE_OPTION
from potstill.ops.divergence import DIVERGENCES
from potstill.recipes import registry
from potstill.recipes.listing import FACTS, list_recipe_facts
from potstill.stages.align.config import AlignConfig
from potstill.stages.candidates.config import CandidatesConfig
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.edit import EditConfig
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.medusa.config import MedusaConfig
from potstill.stages.prune import PruneConfig
from potstill.stages.sequence import PREVIOUS_FOLDER, Stage, is_stage_folder, run_stages
from potstill.stages.skip_layers import SkipLayersConfig
from potstill.stages.spec_game import SpecGameConfig
from potstill.train.config import TrainConfig

NAMES = registry.list_recipe_names()
UNTRAINED = ("lu-lafns", "self-speculative", "spec-game")  # those that train nothing
STUDENTLESS = ("medusa", *UNTRAINED)  # those that train no model
TRAINS = (DistillConfig, AlignConfig, MedusaConfig)
ALIGNED = ("aligndistil", "cm-align")  # those that begin with an alignment, or with what it reads
MORE_DATA = {  # what they read beside --data, as in the recipe
    "m-thinker": {"questions": registry.REQUIRED_QUESTIONS},
    "minichat": {"preferences": registry.OPTIONAL_PREFERENCES},
}
SELF_MADE = [  # those that make their student in a stage of its own
    name
    for name in NAMES
    if isinstance(stage := registry.get_recipe(name).stages[-1], DistillConfig) and stage.student == PREVIOUS_FOLDER
]
ACROSS = [
    name
    for name in NAMES
    if any(
        isinstance(s, DistillConfig) and s.objective.uses_teacher and s.objective.supports_cross_tokenizer
        for s in registry.get_recipe(name).stages
    )
]
APART = {  # no part of a method: names, values looked into, the machine, what is measured or saved, what fits in memory
    *("teacher", "student", "model", "data", "facts", "objective", "settings", "options", "name", "top_k"),
    *("seed", "device", "dtype", "documents", "save_every", "keep_checkpoints", "micro_tokens", "batch"),
    *("mix_exponent", "self_instruct"),  # what the user's data are made of
}


def save_teacher(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, num_layers: int) -> Path:
    """A tiny teacher; of 16 layers every share is within reach."""
    changed = {"num_hidden_layers": num_layers, "intermediate_size": 128, "max_position_embeddings": 512}
    config = LlamaConfig(**{**model.config.to_dict(), **changed})
    return saved(folder, LlamaForCausalLM(config), tokenizer)


# their stages run in the forms of other recipes, and their methods in the tests of objectives and rollouts
REPEATED = {
    *("deltanet", "dskd-cma", "dskdv2", "distillm", "gkd", "mined", "minilm-relations", "minima", "modification"),
    *("aligndistil", "bitnet", "elastic", "layermoe", "matmul-free", "phoenix", "tie-kd", "uld"),
}


OWN_TESTS = ("cm-align", "m-thinker")  # in files of their own, since their model has to be right at times


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in REPEATED else name
        for name in NAMES
        if name not in OWN_TESTS
    ],
)
def test_the_tiny_form_runs(
    name: str, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, pairs: Path, tmp_path: Path
) -> None:
    recipe = registry.get_recipe(name, tiny=True)
    cuts = any(isinstance(stage, DistillConfig) and stage.keep is not None for stage in recipe.stages)
    teacher = save_teacher(tmp_path / "teacher", tiny_llama, tiny_tokenizer, num_layers=16 if cuts else 8)
    tokens = None if name in UNTRAINED else 256
    prepare = add_answers if name in ALIGNED else Path
    data = {"layermoe": add_languages, "lu-lafns": write_facts}.get(name, prepare)(pairs)
    chosen = recipe.override(teacher=str(teacher), data=str(data), tokens=tokens)
    done = run_stages(chosen.stages, tmp_path / "made")
    assert done.measures


def write_facts(rows: Path) -> Path:
    """A fact in two languages."""
    texts = {"en": "What is Ann?", "fr": "Ann, quoi?"}
    lines = [
        {"fact": "1", "language": name, "subject": "Ann", "prompt": prompt, "target": "a"}
        for name, prompt in texts.items()
    ]
    return written(rows.with_name("facts.jsonl"), lines)


def add_languages(rows: Path) -> Path:
    """The same rows, each in one of three languages."""
    lines = enumerate(rows.read_text().splitlines())
    labeled = [json.loads(line) | {"language": ("en", "de", "fr")[i % 3]} for i, line in lines]
    return written(rows.with_name("labeled.jsonl"), labeled)


def add_answers(rows: Path) -> Path:
    """The same questions, each with a chosen and a rejected answer."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    answered = [{"prompt": line["prompt"], "chosen": line["response"], "rejected": "I do not know."} for line in lines]
    return written(rows.with_name("answered.jsonl"), answered)


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A tiny teacher whose tokens are several letters long."""
    return saved(tmp_path / "stranger", random_llama(byte_level(), context=512), byte_level())


@pytest.mark.parametrize("name", ACROSS)
def test_the_tiny_form_runs_between_two_tokenizers(
    name: str, stranger: Path, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    recipe = registry.get_recipe(name, tiny=True)
    chosen = recipe.override(teacher=str(stranger), student=str(teacher), data=str(pairs), tokens=256)
    done = run_stages(chosen.stages, tmp_path / "made")
    student, own, other = (load_model(str(folder)).tokenizer.get_vocab() for folder in (done.out, teacher, stranger))
    assert student == own != other
    assert {parent["role"] for parent in done.card["parents"]} == {"student", "teacher"}


def test_the_table_of_all_recipes_says_what_the_recipes_say() -> None:
    recipes = [recipe.to_dict() for recipe in registry.list_recipes()]
    assert list_recipe_facts() == [{name: recipe[name] for name in FACTS} for recipe in recipes]


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_says_whether_tokenizers_may_differ(name: str) -> None:
    assert ("--teacher and --student may differ in tokenizer" in registry.get_recipe(name).summary) == (name in ACROSS)


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_form_is_the_same_method(name: str) -> None:
    full, tiny = (registry.get_recipe(name, tiny=small) for small in (False, True))
    assert [type(stage) for stage in full.stages] == [type(stage) for stage in tiny.stages]
    for a, b in zip(full.stages, tiny.stages, strict=True):
        assert method(a) == method(b)


def method(stage: Stage) -> Stage:
    """A stage without its budget."""
    if isinstance(stage, PruneConfig | ConvertConfig):
        return replace(stage, calibration_tokens=1)
    if isinstance(stage, CandidatesConfig):
        return replace(stage, documents=1, max_tokens=1, per_language=min(1, stage.per_language))
    if isinstance(stage, GenerateDatasetConfig):
        return replace(stage, documents=1)
    if isinstance(stage, SkipLayersConfig):
        return replace(stage, documents=1, max_evaluations=1)
    if isinstance(stage, SpecGameConfig):
        return replace(stage, documents=1, max_tokens=2)
    if isinstance(stage, EditConfig):
        return replace(stage, limit=1, steps=1, paraphrases=0, max_tokens=1)
    budget = {"tokens": 1, "epochs": None, "context": 1, "batch_tokens": 1, "micro_tokens": 1}
    if isinstance(stage, DistillConfig):
        stage = replace(stage, min_document_tokens=0)
    if isinstance(stage, AlignConfig) and stage.reward:
        stage = replace(stage, max_tokens=1)
    return replace(stage, documents=1, settings=replace(stage.settings, **budget))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_it_and_its_numbers_come_from(name: str) -> None:
    recipe = registry.get_recipe(name)
    module = importlib.import_module(f"potstill.recipes.{name.replace('-', '_')}")
    assert re.search(r"Source:[^\n]*\n?[^\n]*arXiv:\d{4}\.\d{5}", module.__doc__ or "")
    assert recipe.name == name
    assert re.match(r"@\w+\{\w+,", recipe.bibtex)
    assert re.search(r"arXiv:\d{4}\.\d{5}", recipe.source)
    assert recipe.summary
    assert all(recipe.origins.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_recipe_has_an_origin(name: str) -> None:
    recipe = registry.get_recipe(name)
    own, found = (", ".join(origins).split(", ") for origins in (recipe.origins, recipe.complete_origins))
    numbers = [one for stage in recipe.stages for one in numbers_of(stage)]
    assert {number for number, chosen in numbers if chosen} <= set(own)
    assert {number for number, _ in numbers} <= set(found)
    assert len(found) == len(set(found))
    assert set(found) <= {number for number, _ in numbers} | names_of(*recipe.stages)
    assert recipe.to_dict()["origins"] == recipe.complete_origins


def numbers_of(stage: Stage) -> Iterator[tuple[str, bool]]:
    """What a stage's method depends on: each number and each choice, and whether the recipe itself has to account."""
    values: list[Any] = [stage]
    if isinstance(stage, MedusaConfig | AlignConfig):
        values += [stage.settings]
    if isinstance(stage, DistillConfig):
        values += [stage.settings, *([stage.objective] if stage.objective.uses_teacher else [])]
        if stage.rollout_config.is_enabled:
            yield "on_policy", True
        for option in options_of(stage.objective) if stage.objective.uses_teacher else ():
            yield (option if option not in names_of(stage) else f"objective.{option}"), True
    for value in values:
        for field in fields(value):
            given = getattr(value, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            number = isinstance(given, int | float) and not isinstance(given, bool)
            if field.name not in APART and (number or given != default):
                yield field.name, given != default


def options_of(objective: ObjectiveConfig) -> set[str]:
    """All options of an objective, given or not."""
    options: set[str] = set()
    for name in (named.term.name for named in objective.named_terms):
        if method := OBJECTIVE_SPECS.get(name):
            options |= {*method.numeric_options, *([DIVERGENCE_OPTION] if method.takes_divergence else [])}
        elif name in DIVERGENCES:
            parameters = signature(DIVERGENCES[name]).parameters.values()
            options |= {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return options


def names_of(*stages: Stage) -> set[str]:
    """Everything that stages can be told, but for an objective's options."""
    return {
        field.name
        for kind in (DistillConfig, TrainConfig, ObjectiveConfig, *map(type, stages))
        for field in fields(kind)
    }


def test_what_a_recipe_says_itself_goes_before_the_house() -> None:
    recipe = replace(registry.get_recipe("gkd"), origins={"warmup, clip": "theirs", "temperature": "the paper"})
    found = {name: said for names, said in recipe.complete_origins.items() for name in names.split(", ")}
    assert (found["warmup"], found["clip"], found["temperature"]) == ("theirs", "theirs", "the paper")
    assert found["final_rate"] == found["batch_tokens"] == "ours, the defaults of distill"


@pytest.mark.parametrize("name", NAMES)
def test_names_budget_and_seed_can_be_changed(name: str) -> None:
    tokens = None if name in UNTRAINED else 7
    more = dict.fromkeys(MORE_DATA.get(name, {}), "other.jsonl")
    recipe = registry.get_recipe(name).override(teacher="another", data="other.jsonl", tokens=tokens, seed=3, **more)
    for stage in recipe.stages:
        assert "smollm2" not in str(stage.to_dict())
        assert stage.data == "other.jsonl" or is_stage_folder(stage.data)
        if isinstance(stage, TRAINS):
            assert (stage.settings.tokens, stage.settings.seed) == (7, 3)
    own = registry.get_recipe(name).stages[0].data
    assert registry.get_recipe(name).override(data=own, seed=1, **MORE_DATA.get(name, {})) == registry.get_recipe(name)
    if name in UNTRAINED:
        return
    passes = registry.get_recipe(name).override(data="other.jsonl", epochs=2.0, **more).stages[-1]
    assert isinstance(passes, TRAINS)
    assert (passes.settings.tokens, passes.settings.epochs) == (None, 2.0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*SELF_MADE, *STUDENTLESS, *ALIGNED)])
def test_the_student_can_be_another_model(name: str) -> None:
    more: dict[str, Any] = {"teacher": "large", "data": "other.jsonl", **MORE_DATA.get(name, {})}
    recipe = registry.get_recipe(name).override(**more)
    changed = registry.get_recipe(name).override(**more, student="small")
    for before, stage in zip(recipe.stages, changed.stages, strict=True):
        if isinstance(stage, DistillConfig):
            assert (stage.student, stage.keep, stage.params) == ("small", None, None)
            assert isinstance(before, DistillConfig)
            stage = replace(stage, student=before.student, keep=before.keep, params=before.params)
        assert stage == before


@pytest.mark.parametrize("name", SELF_MADE)
def test_what_makes_its_student_itself_takes_no_other(name: str) -> None:
    assert any(
        isinstance(stage, DistillConfig) and stage.student == PREVIOUS_FOLDER
        for stage in registry.get_recipe(name).stages
    )
    with pytest.raises(UsageError, match=rf"{name} makes its own student, so it takes no --student"):
        registry.get_recipe(name).override(student="small", data="other.jsonl")


@pytest.mark.parametrize("name", ALIGNED)
def test_an_alignment_begins_with_its_teacher_and_takes_no_student(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} makes its own student, .* that it starts from with --teacher"):
        registry.get_recipe(name).override(student="small", data="other.jsonl")


@pytest.mark.parametrize("name", UNTRAINED)
def test_what_trains_nothing_takes_no_budget(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} trains nothing, so it takes no --tokens"):
        registry.get_recipe(name).override(data="other.jsonl", tokens=7)


@pytest.mark.parametrize("name", STUDENTLESS)
def test_what_trains_no_model_takes_no_student(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} trains no model of its own, so it takes no --student"):
        registry.get_recipe(name).override(data="other.jsonl", student="small")


@pytest.mark.parametrize("named", [{"teacher": "another"}, {"student": "another"}])
def test_a_fine_tuned_model_starts_as_its_teacher(named: dict[str, str]) -> None:
    (stage,) = registry.get_recipe("minichat").override(data="chats.jsonl", **named).stages
    assert isinstance(stage, DistillConfig)
    assert (stage.teacher, stage.student) == ("another", "another")


def test_run_mixes_the_data_that_it_is_given(tmp_path: Path) -> None:
    out, options = str(tmp_path / "made"), {"dry_run": True, "as_json": True}
    for given, data in ((["a.jsonl"], "a.jsonl"), (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"])):
        (stage,) = cli.run("phoenix", out, data=given, overwrite=True, **options)["stages"]
        assert stage["data"] == data
    assert "data:\n- a.jsonl\n- b.jsonl" in (tmp_path / "made.yaml").read_text()


def test_run_takes_a_student(tmp_path: Path) -> None:
    out = str(tmp_path / "made")
    (stage,) = cli.run("uld", out, teacher="large", student="small", dry_run=True, as_json=True)["stages"]
    assert (stage["teacher"], stage["student"], stage["keep"]) == ("large", "small", None)


def test_run_passes_the_draft_vocabulary_on(tmp_path: Path) -> None:
    out, options = str(tmp_path / "made"), {"data": ["other.jsonl"], "dry_run": True, "as_json": True}
    answers, draft = cli.run("draft", out, draft_vocabulary="16k", **options)["stages"]
    assert "draft_vocabulary" not in answers
    assert draft["draft_vocabulary"] == 16000
    assert "draft_vocabulary: 16k" in (tmp_path / "made.yaml").read_text()
    with pytest.raises(UsageError, match="medusa ends in no distillation, so it takes no --draft-vocabulary"):
        cli.run("medusa", out, draft_vocabulary="16k", **options)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("minichat", "a .jsonl file"), ("phoenix", "two .jsonl files"), ("miniloong", "a folder of books")],
)
def test_a_recipe_without_the_data_that_it_needs_is_refused(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"give --data.*such as {hint}"):
        registry.get_recipe(name).override(seed=1)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(NotFound, match=r"dskd-cma.*minima.*vanilla-kd"):
        registry.get_recipe("alchemy")
