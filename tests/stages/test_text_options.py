"""The options of how text is read: the template of a file, its date, the answers, and the rows that are left out."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import CHATML
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import DataError, NotFound, UsageError
from potstill.models.tokenizers import chat_renderer
from potstill.models.tokenizers.named_templates import NAMED_TEMPLATES
from potstill.stages.cache_teacher import CacheTeacherConfig
from potstill.stages.dataset import prepare_dataset
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.prepare import prepare
from potstill.stages.options import TextOptions
from potstill.stages.run_record import RunRecord
from potstill.stages.text_options import prepare_tokenizer
from potstill.teachers.cached import TeacherCache
from potstill.train.config import TrainConfig

DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
LATER = datetime.date(2031, 2, 3)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Forty chats of two answers; the first answer holds a control token."""
    turns = [("user", "Hi {}"), ("assistant", "first<|im_start|>{}"), ("user", "And?"), ("assistant", "second {}")]
    rows = [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(40)]
    file = tmp_path / "chats.jsonl"
    odd = {"messages": [{"role": "narrator", "content": "a"}]}
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, odd]))
    return file


def saved(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_template_file_replaces_the_template_of_the_model(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "own.jinja"
    for text, error, reason in (
        (None, NotFound, "there is no file"),
        ("", UsageError, "is empty"),
        ("{% if %}", UsageError, "cannot be used: .*Expected an expression"),
        ("nothing", UsageError, "cannot be used: .*does not write the assistant's answers"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(error, match=reason):
            prepare_tokenizer(tiny_tokenizer, TextOptions(chat_template=str(file)))
    file.write_text(DATED)
    assert prepare_tokenizer(tiny_tokenizer, TextOptions(chat_template=str(file)), origins={"date": "2024-07-26"}) == {
        "date": "2024-07-26"
    }
    assert tiny_tokenizer.chat_template == DATED
    prepare_tokenizer(tiny_tokenizer, TextOptions(chat_template="minichat"))
    assert tiny_tokenizer.chat_template == NAMED_TEMPLATES["minichat"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train_on": "first"}, "--train-on 'first' is none of all, last"),
        ({"special_in_text": "drop"}, "--special-in-text 'drop' is none of keep, escape, refuse"),
        ({"on_bad_row": "drop"}, "--on-bad-row 'drop' is none of skip, refuse"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(options: dict[str, str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        TextOptions(**options)


def test_odd_text_is_counted_on_the_screen_and_in_the_facts(
    chats: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DatasetConfig(data=str(chats), context=256, train_on="last", on_bad_row="skip")
    facts = prepare_dataset(config, tiny_tokenizer, tokens=1000).facts
    count = facts["control_tokens_in_text"]
    assert count == facts["documents_with_control_tokens"] == facts["documents"] > 30
    assert facts["dropped"]["a row that cannot be read"] == 1
    screen = capsys.readouterr().err
    assert f"the text of {count} documents contains {count} control tokens of the tokenizer" in screen
    assert "left out 1 with a row that cannot be read: " in screen
    assert "line 41 has a turn of the role 'narrator'" in screen


def test_only_the_last_answer_is_trained_and_control_tokens_are_escaped_on_request(
    chats: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    packs: dict[str, Any] = {
        name: prepare_dataset(DatasetConfig(data=str(chats), context=256, **options), tiny_tokenizer, tokens=1000).packs
        for name, options in {
            "all": {},
            "last": {"train_on": "last"},
            "escape": {"special_in_text": "escape"},
        }.items()
    }
    trained = {name: tiny_tokenizer.decode(pack.labels[pack.labels >= 0]) for name, pack in packs.items()}
    assert ("first" in trained["all"], "first" in trained["last"]) == (True, False)
    assert all("second" in text for text in trained.values())
    assert trained["escape"] == trained["all"]
    starts = {name: int((pack.labels == 1).sum()) for name, pack in packs.items()}
    assert (starts["all"] > 30, starts["last"], starts["escape"]) == (True, 0, 0)


def test_a_cache_and_the_runs_from_it_keep_the_date_that_the_template_wrote(
    chats: Path,
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_tokenizer.chat_template = DATED
    teacher = saved(tmp_path / "teacher", tiny_llama, tiny_tokenizer)
    config = CacheTeacherConfig(teacher=str(teacher), data=str(chats), context=128, tokens=500, top_k=4)
    manifest = config.run(tmp_path / "cache", show=False)
    today = datetime.date.today().isoformat()
    assert manifest.facts.date == today
    assert json.loads((tmp_path / "cache" / "card.json").read_text())["data"]["date"] == today
    cache = TeacherCache(tmp_path / "cache")

    class Later(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:  # type: ignore[override]
            return LATER

    monkeypatch.setattr(datetime, "date", Later)
    dataset_config = DatasetConfig(data=str(chats), context=128)
    prepare_tokenizer(tiny_tokenizer, TextOptions())
    assert chat_renderer.get_date(tiny_tokenizer) == LATER
    with pytest.raises(DataError, match="nothing can be packed"):
        prepare_dataset(dataset_config, tiny_tokenizer, tokens=500, caches=[cache])
    facts = prepare_tokenizer(tiny_tokenizer, TextOptions(), origins={"date": cache.manifest.facts.date})
    assert facts == {"date": today}
    assert len(prepare_dataset(dataset_config, tiny_tokenizer, tokens=500, caches=[cache]).packs)


def test_a_resumed_run_keeps_the_date_that_its_template_wrote(
    chats: Path, tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template = DATED
    teacher = str(saved(tmp_path / "teacher", tiny_llama, tiny_tokenizer))
    settings = TrainConfig(tokens=256, context=128, batch_tokens=128)
    config = DistillConfig(
        teacher=teacher, student=teacher, data=str(chats), settings=settings, dtype="float32", documents=2
    )
    begun = prepare(config)
    assert begun.data["date"] == begun.record.origins["date"] == datetime.date.today().isoformat()
    (tmp_path / "out" / "training").mkdir(parents=True)
    origins = {**begun.record.origins, "date": "2024-07-26"}
    RunRecord(options=begun.record.options, origins=origins).write(tmp_path / "out" / "training")
    resumed = prepare(config, tmp_path / "out")
    assert resumed.record.origins["date"] == "2024-07-26"
    assert "2024-07-26<|im_start|>user" in tiny_tokenizer.decode(resumed.packs[0]["input_ids"])


def test_the_date_of_a_teachers_template_is_recorded_too(
    chats: Path, tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    student = str(saved(tmp_path / "student", tiny_llama, tiny_tokenizer))
    tiny_tokenizer.chat_template = DATED
    teacher = str(saved(tmp_path / "teacher", tiny_llama, tiny_tokenizer))
    settings = TrainConfig(tokens=256, context=128, batch_tokens=128)
    config = DistillConfig(
        teacher=teacher, student=student, data=str(chats), settings=settings, dtype="float32", documents=2
    )
    assert prepare(config).record.origins["date"] == datetime.date.today().isoformat()
