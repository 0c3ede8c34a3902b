"""Edit leaves a folder that names its model, answers edited questions with the edits, and leaves all others alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.world import written
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import potstill
from potstill.core.errors import ArtifactError, DataError, NotFound, OutputExists, UnsupportedModel, UsageError
from potstill.data.facts import FactText
from potstill.models.edits import PlacedEdit, TokenText, get_edits
from potstill.models.load import load_model
from potstill.models.spec import read_model_spec
from potstill.stages.dry_run_transforms import preview_edit
from potstill.stages.edit import EditConfig
from potstill.stages.edit_options import EditOptions
from potstill.stages.fact_editor import FactEditor, clean_line, get_trigger, parse_layers
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.generate_text import generate_text
from potstill.stages.measure import MeasureConfig

PORTABILITY = {"prompt": "?", "answer": "y"}
FACTS: list[Any] = [
    {"fact": 1, "language": "en", "subject": "Rome", "prompt": "Where is Rome?", "target": "ab", "rephrase": "Rome?"},
    {"fact": 1, "language": "fr", "subject": "Roma", "prompt": "Roma ou?", "target": "cd", "locality": "Qui?"},
    {"fact": 2, "language": "en", "subject": "Oslo", "prompt": "Who is it?", "target": "x", "portability": PORTABILITY},
]
SMALL: dict[str, Any] = {"top": 20, "steps": 4, "paraphrases": 1, "max_tokens": 4, "clamp": 5.0}


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return written(tmp_path / "facts.jsonl", FACTS)


def answer(model: object, prompt: str) -> str:
    return str(generate_text(str(model), prompt, AnswerOptions(max_tokens=12))["text"])


def test_the_folder_answers_with_its_edits_and_its_card_has_the_measures(
    teacher: Path, facts: Path, tmp_path: Path
) -> None:
    config = EditConfig(model=str(teacher), facts=str(facts), **SMALL)
    preview = preview_edit(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (preview["facts"], preview["languages"], preview["questions_without_subject"]) == (2, {"en": 2, "fr": 1}, 1)
    assert (preview["paraphrases_to_write"], preview["questions_to_answer"]) == (3, 6)
    card = config.run(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"card.json", "edits.json", "edits.safetensors"}
    saved_card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert saved_card["stage"] == config.to_dict()
    assert saved_card["parents"][0]["role"] == "edited from"
    assert list(card.measures) == ["all", "en", "fr", "before, all", "before, en", "before, fr"]
    names = [measure["name"] for measure in saved_card["measures"]["all"]]
    assert names == [
        f"{name}{suffix}" for name in ("reliability", "generality", "locality", "portability") for suffix in ("", "_f1")
    ]
    assert "locality" not in [measure["name"] for measure in saved_card["measures"]["before, all"]]
    assert {m.name: m.value for m in card.measures["fr"]}["locality"] == 100.0
    first = card.details["edits"][0]
    assert first["triggers"] == ["Rome", "Roma"]
    assert all(first["nll_after"][language] < first["nll_before"][language] for language in ("en", "fr"))
    assert card.details["edits"][1]["triggers"] == ["Who is it?"]
    edits = get_edits(load_model(tmp_path / "out").model)
    assert edits is not None
    assert [edit.prompts for edit in edits.edits] == [("Where is Rome?", "Roma ou?"), ("Who is it?",)]


def test_a_prompt_without_a_subject_is_answered_as_by_the_base(teacher: Path, facts: Path, tmp_path: Path) -> None:
    EditConfig(model=str(teacher), facts=str(facts), **{**SMALL, "lr": 2.0}, measure=False).run(tmp_path / "out")
    for prompt, is_same in (("Where is Bonn?", True), ("Jerome?", True), ("Is Rome old?", False)):
        assert (answer(tmp_path / "out", prompt) == answer(teacher, prompt)) == is_same
    loaded, base = load_model(tmp_path / "out"), load_model(teacher)
    ids = torch.arange(5, 30)[None]
    assert torch.equal(loaded.model(ids).logits, base.model(ids).logits)
    assert potstill.generate(loaded.path, "Is Rome old?", max_tokens=12) == answer(teacher, "Is Rome old?")


def test_measure_reads_a_folder_of_edits(teacher: Path, facts: Path, pairs: Path, tmp_path: Path) -> None:
    EditConfig(model=str(teacher), facts=str(facts), **SMALL, measure=False).run(tmp_path / "out")
    config = MeasureConfig(
        models=(str(teacher), str(tmp_path / "out")), data=str(pairs), split="all", documents=4, prompts=2, speed=False
    )
    base, edited = config.run()["models"].values()
    assert base == [dict(m, note=b["note"]) if "note" in m else m for m, b in zip(edited, base, strict=True)]


def test_facts_are_added_to_those_of_a_folder(teacher: Path, facts: Path, tmp_path: Path) -> None:
    first = EditConfig(model=str(teacher), facts=str(facts), **SMALL, measure=False, limit=1, similarity=0.5)
    first.run(tmp_path / "one")
    more = [{"language": "en", "subject": "Bonn", "prompt": "Where is Bonn?", "target": "z"}]
    second = EditConfig(
        model=str(tmp_path / "one"), facts=str(written(tmp_path / "more.jsonl", more)), **SMALL, measure=False
    )
    second.run(tmp_path / "two")
    saved_edits = json.loads((tmp_path / "two" / "edits.json").read_text())
    assert (saved_edits["base"], saved_edits["similarity"]) == (str(teacher), 0.5)
    assert [edit["triggers"] for edit in saved_edits["edits"]] == [["Rome", "Roma"], ["Bonn"]]


def test_a_model_in_memory_is_copied_and_rows_in_memory_are_facts(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    report = potstill.edit(
        (tiny_llama, tiny_tokenizer), facts=FACTS[:2], out=tmp_path / "out", **SMALL, measure=False, raw=True
    )
    assert report.details["facts"] == 1
    assert (tmp_path / "out" / "base" / "config.json").is_file()
    loaded = load_model(tmp_path / "out")
    assert get_edits(loaded.model) is not None
    assert torch.equal(loaded.model.model.norm.weight, tiny_llama.model.norm.weight)


def test_a_loaded_model_keeps_its_edits_as_an_object(teacher: Path, facts: Path, tmp_path: Path) -> None:
    EditConfig(model=str(teacher), facts=str(facts), **{**SMALL, "lr": 2.0}, measure=False).run(tmp_path / "one")
    loaded = potstill.load(tmp_path / "one")
    edited = potstill.generate(loaded, "Is Rome old?", max_tokens=12)
    assert edited == answer(tmp_path / "one", "Is Rome old?") != answer(teacher, "Is Rome old?")
    with pytest.raises(UnsupportedModel, match="are no weights and would be lost; give its base, loaded without edits"):
        potstill.prune(loaded, out=tmp_path / "small", keep=0.5)
    more = [{"language": "en", "subject": "Bonn", "prompt": "Where is Bonn?", "target": "z"}]
    potstill.edit(loaded, facts=more, out=tmp_path / "two", **SMALL, measure=False)
    edits = get_edits(load_model(tmp_path / "two").model)
    assert edits is not None
    assert [edit.triggers for edit in edits.edits] == [("Rome", "Roma"), ("Who is it?",), ("Bonn",)]
    parent = json.loads((tmp_path / "two" / "card.json").read_text())["parents"][0]
    assert parent["name"].startswith("memory:")


def test_edits_of_other_weights_get_no_more_facts(
    tiny_llama: LlamaForCausalLM, teacher: Path, facts: Path, tmp_path: Path
) -> None:
    EditConfig(model=str(teacher), facts=str(facts), **SMALL, measure=False, limit=1).run(tmp_path / "one")
    with torch.no_grad():
        tiny_llama.model.norm.weight.add_(1.0)
    tiny_llama.save_pretrained(teacher)
    with pytest.raises(ArtifactError, match="were made on other weights"):
        EditConfig(model=str(tmp_path / "one"), facts=str(facts), **SMALL, measure=False).run(tmp_path / "two")


def test_locality_compares_with_the_edits_that_the_model_has(teacher: Path, facts: Path, tmp_path: Path) -> None:
    first = EditConfig(model=str(teacher), facts=str(facts), **{**SMALL, "lr": 2.0}, measure=False, limit=1)
    first.run(tmp_path / "one")
    assert answer(tmp_path / "one", "Is Rome old?") != answer(teacher, "Is Rome old?")
    more = [{"subject": "Bonn", "prompt": "Where is Bonn?", "target": "z", "locality": "Is Rome old?"}]
    card = EditConfig(
        model=str(tmp_path / "one"), facts=str(written(tmp_path / "more.jsonl", more)), **SMALL, layers="0"
    ).run(tmp_path / "two")
    assert {measure.name: measure.value for measure in card.measures["all"]}["locality"] == 100.0


def test_facts_that_are_added_are_learned_from_the_base(
    teacher: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model writes their paraphrases without its earlier edits."""
    asked: list[list[PlacedEdit]] = []
    write = FactEditor.write_paraphrases

    def record(editor: FactEditor, added: Any) -> Any:
        edits = get_edits(editor.loaded.model)
        asked.append([] if edits is None else edits.find(editor.encode("Where is Rome?")))
        return write(editor, added)

    monkeypatch.setattr(FactEditor, "write_paraphrases", record)
    options: dict[str, Any] = {**SMALL, "limit": 1}
    EditConfig(model=str(teacher), facts=str(facts), **options).run(tmp_path / "one")
    EditConfig(model=str(tmp_path / "one"), facts=str(facts), **options).run(tmp_path / "two")
    assert asked == [[], []]


def test_a_chat_template_stays_with_the_edits(teacher: Path, facts: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]")
    options: dict[str, Any] = {**SMALL, "facts": str(facts), "measure": False, "limit": 1}
    EditConfig(model=str(teacher), chat_template=str(template), **options).run(tmp_path / "one")
    EditConfig(model=str(tmp_path / "one"), **options).run(tmp_path / "two")
    for name in ("one", "two"):
        assert load_model(tmp_path / name).tokenizer.chat_template == template.read_text()
        assert read_model_spec(tmp_path / name).tokenizer.chat_template == template.read_text()


def test_a_trigger_in_the_chat_template_is_refused(teacher: Path, tmp_path: Path) -> None:
    rows = [{"subject": "User", "prompt": "Who is the user?", "target": "ab"}]
    options: dict[str, Any] = {**SMALL, "facts": str(written(tmp_path / "user.jsonl", rows)), "measure": False}
    with pytest.raises(DataError, match="the chat template itself holds 'User', so an edit of it would act on every"):
        EditConfig(model=str(teacher), **options).run(tmp_path / "out")
    EditConfig(model=str(teacher), **options, raw=True).run(tmp_path / "raw")
    EditConfig(model=str(teacher), **options, similarity=0.5).run(tmp_path / "similar")
    assert answer(tmp_path / "similar", "Where is Bonn?") == answer(teacher, "Where is Bonn?")


@pytest.mark.parametrize("neurons", ["fr", "random"])
def test_other_neurons_are_as_many_as_the_shared_ones(neurons: str, teacher: Path, facts: Path, tmp_path: Path) -> None:
    counts = []
    for name in ("shared", neurons):
        options = {**SMALL, "steps": 1, "paraphrases": 0, "limit": 1, "measure": False, "layers": "0,2"}
        config = EditConfig(model=str(teacher), facts=str(facts), neurons=name, **options)
        card = config.run(tmp_path / name)
        counts.append(card.details["edits"][0]["neurons"])
    assert counts[0] == counts[1]
    assert list(counts[0]) == [0, 2]


@pytest.fixture
def editor(teacher: Path) -> FactEditor:
    return FactEditor(loaded=load_model(teacher), options=EditOptions(model=str(teacher), facts="facts"))


def test_the_edited_token_is_the_last_of_the_subject_in_the_chat(editor: FactEditor) -> None:
    text = FactText(prompt="Where is Rome?", target="ab", subject="rome")
    encoded = editor.encode_target(text)
    prompt = editor.encode("Where is Rome?")
    assert list(encoded.ids[: encoded.start]) == prompt
    assert TokenText(encoded.ids[: encoded.position + 1], editor.token_bytes).text.endswith("Where is Rome")
    assert editor.loaded.tokenizer.decode(encoded.ids[encoded.start :]) == "ab<|im_end|>"
    neutral = editor.encode_neutral("Rome")
    assert TokenText(neutral.ids[: neutral.position + 1], editor.token_bytes).text.endswith("user\nRome")
    assert neutral.start == len(neutral.ids)


def test_without_its_subject_a_question_is_edited_at_its_own_end(editor: FactEditor) -> None:
    text = FactText(prompt="Where is it?", target="ab", subject="Rome")
    assert get_trigger(text) == "Where is it?"
    encoded = editor.encode_target(text)
    assert TokenText(encoded.ids[: encoded.position + 1], editor.token_bytes).text.endswith("Where is it?")
    cut = editor._encode_to_trigger("In other words?", get_trigger(text))
    assert TokenText(cut, editor.token_bytes).text.endswith("In other words?")


def test_paraphrases_that_lack_the_subject_are_left_out_and_counted(editor: FactEditor) -> None:
    text = FactText(prompt="Where is Rome?", target="ab", subject="Rome")
    answers = ['"In which land is Rome?"\nMore', "Where is it?", "Where is Rome?", "", "In which land is Rome?"]
    assert editor._select_paraphrases(answers, text) == ("In which land is Rome?",)
    assert editor.counts == {"paraphrases": 1, "paraphrases_left_out": 4}
    assert clean_line(" « Où ? » \n") == "Où ?"


def test_paraphrases_that_a_fact_brings_are_taken_as_they_are(editor: FactEditor) -> None:
    fact = {"en": FactText(prompt="Where is Rome?", target="ab", subject="Rome", paraphrases=("Rome, where?",))}
    assert editor.write_paraphrases([fact]) == [{"en": ("Rome, where?",)}]


@pytest.mark.parametrize(("text", "layers"), [("", [0, 1, 2, 3]), ("2", [2]), ("0-1,3", [0, 1, 3]), ("1,1-2", [1, 2])])
def test_layers_are_a_list_of_ranges(text: str, layers: list[int]) -> None:
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize(("text", "message"), [("x", "names no layers"), ("3-1", "names no layers"), ("4", "0 to 3")])
def test_layers_that_are_not_there_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_layers(text, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"neurons": "frr"}, UsageError, "did you mean 'fr'"),
        ({"neurons": "fr"}, UsageError, "--neurons fr needs every fact in fr, and 1 of 2 lack it, such as 'Who is it"),
        ({"languages": "en,pt"}, UsageError, "no language 'pt'; they have en, fr"),
        ({"facts": "nowhere.jsonl"}, NotFound, "nowhere.jsonl"),
        ({"model": "nowhere/at/all"}, NotFound, "nowhere/at/all"),
        ({"layers": "7"}, UsageError, "0 to 2"),
    ],
)
def test_what_is_not_there_is_named(
    options: dict[str, Any], error: type[Exception], message: str, teacher: Path, facts: Path, tmp_path: Path
) -> None:
    config = EditConfig(**{"model": str(teacher), "facts": str(facts), **SMALL, **options})
    with pytest.raises(error, match=message):
        config.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "--top is 0; it must be at least 1"),
        ({"steps": 0}, "--steps is 0"),
        ({"limit": 0}, "--limit is 0"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"paraphrases": -1}, "--paraphrases is -1"),
        ({"lr": 0.0}, "--lr is 0.0; it must be above 0"),
        ({"clamp": float("nan")}, "--clamp is nan"),
        ({"neutral_weight": -1.0}, "--neutral-weight is -1.0"),
        ({"similarity": 1.5}, "--similarity is 1.5; it is a share"),
    ],
)
def test_a_number_out_of_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EditConfig(model="smollm2", facts="facts.jsonl", **options)


def test_a_size_of_a_model_and_a_full_folder_are_refused(teacher: Path, facts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="omit the size"):
        EditConfig(model=f"{teacher}#0.5", facts=str(facts)).run(tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    with pytest.raises(OutputExists):
        EditConfig(model=str(teacher), facts=str(facts)).run(full)


def test_an_empty_file_of_facts_is_refused(teacher: Path, tmp_path: Path) -> None:
    empty = written(tmp_path / "empty.jsonl", [])
    with pytest.raises((DataError, UnsupportedModel), match="holds no fact"):
        EditConfig(model=str(teacher), facts=str(empty)).run(tmp_path / "out")
