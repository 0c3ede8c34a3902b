"""Facts are read from the benchmarks' rows and from plain rows, merged over files, and refused in one sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, NotFound, UsageError
from potstill.data.facts import FactText, Question, count_missing_subjects, list_languages, load_facts

EN = {"subject": "Rome", "src": "Where is Rome?", "rephrase": "In which land is Rome?", "alt": "Norway"}
TESTS = {"loc": "Who sang?", "loc_ans": "Abba", "port": "What is Rome's capital?", "port_ans": "Oslo"}
FR = {"subject": "Rome", "src": "Où est Rome ?", "rephrase": "Dans quel pays est Rome ?", "alt": "Norvège"}
ZH = {"subject": "罗马", "src": "罗马在哪里?", "rephrase": "罗马属于哪个国家?", "alt": "挪威"}


def write_rows(path: Path, rows: Any) -> str:
    text = json.dumps(rows, ensure_ascii=False) if path.suffix != ".jsonl" else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    return str(path)


def test_rows_by_language_are_facts(tmp_path: Path) -> None:
    row = {"en": {"case_id": 3, "old": "Italy", **EN, **TESTS}, "fr": FR}
    (fact,) = load_facts([write_rows(tmp_path / "zsre.json", [row])])
    assert fact["en"] == FactText(
        prompt="Where is Rome?",
        target="Norway",
        subject="Rome",
        rephrase="In which land is Rome?",
        locality=(Question("Who sang?", "Abba"),),
        portability=(Question("What is Rome's capital?", "Oslo"),),
    )
    assert fact["fr"].target == "Norvège"
    assert fact["fr"].locality == ()


def test_mzsre_nests_portability(tmp_path: Path) -> None:
    row = {"en": {**EN, "portability": {"New Question": "Its capital?", "New Answer": "Oslo"}}}
    (fact,) = load_facts([write_rows(tmp_path / "mzsre.json", [row])])
    assert fact["en"].portability == (Question("Its capital?", "Oslo"),)


def test_plain_rows_are_facts_and_those_with_one_name_belong_together(tmp_path: Path) -> None:
    rows = [
        {"fact": 1, "language": "en", "subject": "Rome", "prompt": "Where is Rome?", "target": "Norway"},
        {"fact": 1, "language": "fr", "prompt": "Où est Rome ?", "target": "Norvège", "paraphrases": ["Et Rome ?"]},
        {
            "prompt": "Where is Oslo?",
            "target": "Italy",
            "locality": ["Who?", {"prompt": "When?"}],
            "portability": {"prompt": "Its king?", "answer": "None"},
        },
    ]
    first, second = load_facts([write_rows(tmp_path / "facts.jsonl", rows)])
    assert list(first) == ["en", "fr"]
    assert first["fr"].paraphrases == ("Et Rome ?",)
    assert list(second) == ["und"]
    assert second["und"].locality == (Question("Who?"), Question("When?"))
    assert second["und"].portability == (Question("Its king?", "None"),)


def test_one_fact_may_come_from_several_files(tmp_path: Path) -> None:
    def number(text: dict[str, str], n: int) -> dict[str, str]:
        return {**text, "src": f"{n} {text['src']}"}

    files = [
        write_rows(tmp_path / f"zsre_{name}.json", [{"en": number(EN, n), name: number(text, n)} for n in range(3)])
        for name, text in (("fr", FR), ("zh", ZH))
    ]
    facts = load_facts(files)
    assert [list(fact) for fact in facts] == [["en", "fr", "zh"]] * 3
    assert [fact["zh"].prompt[0] for fact in facts] == ["0", "1", "2"]
    assert list_languages(facts) == ["en", "fr", "zh"]
    assert [list(fact) for fact in load_facts(files, languages=("zh", "en"), limit=2)] == [["zh", "en"]] * 2


def test_a_compressed_file_is_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "zsre.json.gz", "wt") as stream:
        json.dump([{"en": EN}], stream)
    assert len(load_facts([str(tmp_path)])) == 1


def test_prompts_without_their_subject_are_counted(tmp_path: Path) -> None:
    rows = [{"en": EN, "fr": {**FR, "subject": "Roma"}, "zh": ZH, "de": {"src": "Wo ist Rom?", "alt": "da"}}]
    assert count_missing_subjects(load_facts([write_rows(tmp_path / "zsre.json", rows)])) == 2
    assert count_missing_subjects([{"en": FactText(prompt="where is rome?", target="x", subject="Rome")}]) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no fact"),
        ([{"en": {**EN, "alts": "x"}}], r"row 1, en has the column 'alts' \(did you mean 'alt'\?\)"),
        ([{"prompt": "Where?", "target": "x", "sujet": "y"}], "has the column 'sujet'"),
        ([{"en": {"subject": "Rome", "src": "Where?"}}], "row 1, en has no target"),
        ([{"prompt": " ", "target": "x"}], "row 1 has no prompt"),
        ([{"English": EN}], "has the language 'English'; write its code"),
        ([{"prompt": "Where?", "target": "x", "language": "Französisch"}], "has the language 'Französisch'"),
        ([{"prompt": "Where?", "target": 5}], "a target that is no text"),
        ([{"prompt": "Where?", "target": "x", "locality": [7]}], "locality holds no question"),
        ([{"prompt": "Where?", "target": "x", "portability": "Its capital?"}], "portability, holds a question without"),
        (
            [{"prompt": "Where?", "target": "x", "port": ["A?", "B?"], "port_ans": ["a", "b"]}],
            "holds a question without an answer; .* the answer as one text",
        ),
        ([{"prompt": "Where?", "target": "x", "paraphrases": [7]}], "paraphrases holds something that is no text"),
    ],
)
def test_a_row_that_is_no_fact_is_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_facts([write_rows(tmp_path / "facts.json", rows)])


def test_a_language_or_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "facts.json", [{"en": EN, "fr": FR}])
    with pytest.raises(UsageError, match="the facts have no language 'pt'; they have en, fr"):
        load_facts([file], languages=("en", "pt"))
    with pytest.raises(NotFound, match="there is no file or folder nowhere"):
        load_facts(["nowhere.json"])


def test_the_benchmarks_are_read_whole(potstill_data: Path) -> None:
    folder = potstill_data / "unclear" / "kedit" / "ercong21__MultiKnow" / "data" / "BMIKE53" / "zsRE"
    files = [str(folder / f"zsre_test_{language}.json.gz") for language in ("fr", "pt")]
    facts = load_facts(files)
    assert len(facts) == 743
    assert all(list(fact) == ["en", "fr", "pt"] for fact in facts)
    assert count_missing_subjects(facts) == 34
    assert all(text.rephrase and text.locality and text.portability for fact in facts for text in fact.values())
    mzsre = potstill_data / "unclear" / "kedit" / "weixuan-wang123__ReMaKE" / "data" / "MzsRE"
    assert len(load_facts([str(mzsre / "mzsre_test_duplicate_enzh.json.gz")])) == 743
