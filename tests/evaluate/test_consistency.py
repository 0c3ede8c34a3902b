"""Which of several answers agree, and which pair of a chosen and a rejected one follows."""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import UsageError
from potstill.evaluate.code_forms import count_edits, read_code
from potstill.evaluate.consistency import KINDS, consistency, prefer
from potstill.evaluate.embeddings import embed_texts
from potstill.ops.edit_distance import edit_distance_table

AREA = "```python\ndef area(width, height):\n    return width * height\n```"
SAME_AREA = 'Ici:\n```python\n# la surface\ndef surface(a, b):\n    """Multiplie."""\n    return (a*b)\n```\nVoilà.'
PERIMETER = "```python\ndef length(a, b):\n    return 2 * (a + b)\n```"
LETTERS = "etaoinshrdlu"


def embed(texts: Sequence[str]) -> Tensor:
    """How often each of twelve letters occurs."""
    return torch.tensor([[float(text.count(letter)) for letter in LETTERS] for text in texts])


def test_numbers_agree_by_their_final_answers() -> None:
    texts = ["so it is 42", r"\boxed{42.0} and not 7", "7", "no number"]
    assert consistency(texts) == pytest.approx([1 / 3, 1 / 3, 0, 0])
    assert consistency(["42", "42.0", "7"]) == pytest.approx([0.5, 0.5, 0])
    assert consistency([r"I try \boxed{4}, no.</think> The answer is 5.", "5"]) == [1.0, 1.0]


def test_code_agrees_whatever_its_names_comments_and_format() -> None:
    assert read_code(AREA) == read_code(SAME_AREA) == "def v0(v1, v2):\n    return v1 * v2"
    first, second, third, fourth = consistency([AREA, SAME_AREA, PERIMETER, "I do not know, sorry"], kind="code")
    assert first == second > third > fourth == 0
    assert consistency([AREA, SAME_AREA], kind="code") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("snippet", "form"),
    [
        ("import numpy as np\nx = np.sum([1])", "import numpy as v0\nv1 = v0.sum([1])"),
        ("for i in range(3): print(i)", "for v0 in range(3):\n    print(v0)"),
        ("def f():\n    '''Nothing.'''", "def v0():\n    pass"),
        ("x = 1 # one", "v0 = 1"),
        ("# nothing", None),
        ("def f(:", None),
        ("a\0b", None),
    ],
)
def test_a_snippet_has_a_form_or_none(snippet: str, form: str | None) -> None:
    assert read_code(snippet) == form


@given(st.text(alphabet="abc", max_size=12), st.text(alphabet="abc", min_size=1, max_size=12))
def test_edits_of_tokens_are_counted_as_by_the_plain_definition(first: str, second: str) -> None:
    expected = int(edit_distance_table([first.encode()], [second.encode()])[0, 0])
    assert count_edits(second, first) == expected


def test_text_agrees_by_the_mean_cosine_to_the_other_texts() -> None:
    a, b, c = embed(["tea", "eat tea", "lord"]).double()
    cosine = torch.nn.functional.cosine_similarity
    expected = [(cosine(a, b, dim=0) + cosine(a, c, dim=0)) / 2, (cosine(a, b, dim=0) + cosine(b, c, dim=0)) / 2]
    assert consistency(["tea", "eat tea", "lord"], kind="text", embed=embed)[:2] == pytest.approx(
        [float(value) for value in expected]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_answer_is_consistent_and_none_gives_no_score(kind: str) -> None:
    assert consistency([f"42\n{AREA}"], kind=kind, embed=embed) == [1.0]
    assert consistency([], kind=kind, embed=embed) == []


SAMPLES = {
    "numbers": ["1", "1.0", "2", "it is 3", "none", "2"],
    "code": [AREA, SAME_AREA, PERIMETER, "x = 1", "no code here", "y = 2"],
    "text": ["tea and toast", "one tea", "lord", "the loud sea", "use it", "oil"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_answers_changes_nothing(kind: str) -> None:
    texts = SAMPLES[kind]
    scores = dict(zip(texts, consistency(texts, kind=kind, embed=embed), strict=True))
    pair = prefer(texts[:1], texts, kind=kind, embed=embed)
    assert pair is not None
    for seed in range(5):
        order = random.Random(seed).sample(texts, len(texts))
        again = dict(zip(order, consistency(order, kind=kind, embed=embed), strict=True))
        assert again == pytest.approx(scores)
        assert prefer(texts[:1], order, kind=kind, embed=embed) == pair


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_answer_is_at_least_as_similar_as_the_rejected_one(kind: str) -> None:
    texts = SAMPLES[kind]
    pair = prefer(texts[:1], texts[1:], kind=kind, embed=embed)
    assert pair is not None
    chosen, rejected = (
        consistency([text, texts[0]], kind=kind, embed=embed)[0] for text in (pair.chosen, pair.rejected)
    )
    assert chosen > rejected


def test_the_majority_is_the_pivot_and_the_pair_is_right_and_wrong() -> None:
    pivots = ["It is 42.", "42", "I get 41.", "42.0", "It is 7."]
    texts = ["donc 41", "donc 42", "je ne sais pas", "donc 7"]
    pair = prefer(pivots, texts)
    assert pair is not None
    assert pair.chosen == "donc 42"
    assert pair.rejected in ("donc 41", "donc 7")


def test_one_pivot_is_the_reference() -> None:
    assert prefer(["42"], ["41", "42"]) == ("42", "41")


@pytest.mark.parametrize(
    ("pivots", "texts"),
    [
        (["1", "2"], ["1", "2"]),  # the pivots tie
        (["1", "1", "2", "2"], ["1", "2"]),
        (["none"], ["1", "2"]),  # no pivot has a vote
        ([], ["1", "2"]),
        (["1"], ["1", "1.0"]),  # all texts are right
        (["1"], ["2", "3"]),  # no text is right
        (["1"], ["1", "no number"]),  # what cannot be read is no wrong answer
        (["1"], ["1"]),
        (["1"], []),
    ],
)
def test_ties_and_what_has_no_vote_give_no_pair(pivots: list[str], texts: list[str]) -> None:
    assert prefer(pivots, texts) is None


@pytest.mark.parametrize("kind", KINDS)
def test_identical_answers_give_no_pair(kind: str) -> None:
    assert prefer([f"42\n{AREA}"] * 3, [f"41\n{PERIMETER}"] * 3, kind=kind, embed=embed) is None


def test_an_unknown_kind_and_a_missing_embedding_are_refused() -> None:
    with pytest.raises(UsageError, match="the kind of consistency is 'sound'; it can be numbers, code, text"):
        consistency(["1"], kind="sound")
    with pytest.raises(UsageError, match="give embed, a function of texts"):
        prefer(["a"], ["b"], kind="text")


def test_a_majority_is_right_more_often_than_a_random_answer_and_so_are_its_pairs() -> None:
    draw = random.Random(1)

    def answer() -> str:
        return "7" if draw.random() < 0.6 else str(draw.randrange(7))

    trials = [([answer() for _ in range(7)], [answer() for _ in range(4)]) for _ in range(100)]
    majority = [prefer(pivots, [*texts, "7", "0"]) for pivots, texts in trials]
    right_share = sum(pair is not None and pair.chosen == "7" for pair in majority) / 100
    random_share = sum(pivots[0] == "7" for pivots, _ in trials) / 100
    assert random_share < 0.8  # 0.6 + 0.4 / 7, and three standard errors
    assert right_share > 0.8


def test_an_embedding_is_the_mean_of_the_last_hidden_states(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = ["a short text", "another", "", "x" * 40]
    embeddings = embed_texts(tiny_llama, tiny_tokenizer, texts, context=32)
    assert embeddings.shape == (4, 32)
    for text, embedding in zip(texts, embeddings, strict=True):
        ids = torch.tensor([tiny_tokenizer(text, add_special_tokens=False).input_ids[:32]])
        with torch.no_grad():
            hidden = tiny_llama.model(ids).last_hidden_state if ids.numel() else torch.zeros(1, 1, 32)
        torch.testing.assert_close(embedding, hidden[0].double().mean(0), rtol=1e-4, atol=1e-5)
    alone = embed_texts(tiny_llama, tiny_tokenizer, texts[1:2])
    torch.testing.assert_close(alone[0], embeddings[1], rtol=1e-4, atol=1e-5)
    assert not embed_texts(tiny_llama, tiny_tokenizer, [""]).any()
