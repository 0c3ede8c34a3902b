"""Rows to score of chats and pairs: of each answer its own text, and the token that ends it.

A chat template writes words of its own around an answer, such as an empty thinking block or the name of a channel.
Training teaches them. Measuring leaves them out, from the likelihood and from the bytes, because each family writes
others. Two models that read one chat by different templates are then scored on the same text:

    <|channel|>final<|message|>Hello.<|return|>        <think>\\n\\n</think>\\n\\nHello.<|im_end|>
                               ^^^^^^^^^^^^^^^^                              ^^^^^^^^^^^^^^^^

The bytes are those of the answer in the document. A token that holds the start or end of the answer together with a
character of the template, such as a space, is scored.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UnsupportedModel
from potstill.core.types import IGNORE
from potstill.data.thinking import THINKING_END
from potstill.evaluate.perplexity import get_bos_id
from potstill.evaluate.scoring_windows import Row
from potstill.models.tokenizers.token_bytes import read_token_bytes

CONTROL = b"\xff"  # stands for a control token; no UTF-8 text holds this byte


class LabeledDocument(NamedTuple):
    """A tokenized chat or pair with the labels of training, and the texts of the assistant's turns in order.

    None stands for a turn that has no text of its own, such as a tool call: it is scored as it is labeled.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    answers: Sequence[str | None]


def build_answer_rows(documents: Iterable[LabeledDocument], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """A row for each document, in which only its answers' own tokens and their ends are scored.

    An answer that the tokenizer does not write as it stands in the document (it changes letters, or hides its bytes) is
    scored as it is labeled, with the bytes of the document.
    """
    reader = _AnswerReader(tokenizer)
    return [reader.build_row(document) for document in documents]


class _Run(NamedTuple):
    """Labeled tokens `start` to `stop` in a row, with their bytes end to end; token i begins at `offsets[i]`."""

    start: int
    stop: int
    text: bytes
    offsets: Sequence[int]


class _AnswerReader:
    """Finds the answers of labeled documents by the bytes of their tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.bos = tokenizer, get_bos_id(tokenizer)
        try:
            token_bytes = read_token_bytes(tokenizer)
        except UnsupportedModel:
            self.bytes_by_id: list[bytes] = []
            self.control_ids = frozenset(tokenizer.all_special_ids)
        else:
            self.bytes_by_id, self.control_ids = token_bytes.by_id, token_bytes.special_ids

    def build_row(self, document: LabeledDocument) -> Row:
        ids = list(document.input_ids)
        is_labeled = [label != IGNORE for label in document.labels]
        prefix_length = int(self.bos is not None and ids[:1] == [self.bos])
        labels, num_bytes = [IGNORE] * len(ids), 0
        runs = self._find_runs(ids, is_labeled)
        for run, answer in zip(runs, match_answers([run.text for run in runs], document.answers), strict=True):
            tokens, size = self._select_tokens(run, ids, answer)
            num_bytes += size
            for i in tokens:
                labels[i] = ids[i] if i and is_labeled[i] else IGNORE
        return Row(ids, labels, num_bytes, prefix_length=prefix_length)

    def _find_runs(self, ids: Sequence[int], is_labeled: Sequence[bool]) -> list[_Run]:
        """The runs of labeled tokens. A row's first token, which nothing predicts, may begin the answer after it."""
        in_run = list(is_labeled)
        in_run[:1] = [any(is_labeled[1:2]) and token not in self.control_ids for token in ids[:1]]
        runs, start = [], 0
        for is_run, group in groupby(in_run):
            stop = start + len(list(group))
            if is_run:
                runs.append(self._read_run(ids, start, stop))
            start = stop
        return runs

    def _read_run(self, ids: Sequence[int], start: int, stop: int) -> _Run:
        text, offsets = b"", []
        for token in ids[start:stop]:
            offsets.append(len(text))
            if token in self.control_ids:
                text += CONTROL
            elif token < len(self.bytes_by_id):
                text += self.bytes_by_id[token]
        return _Run(start, stop, text, [*offsets, len(text)])

    def _select_tokens(self, run: _Run, ids: Sequence[int], answer: str | None) -> tuple[list[int], int]:
        """The tokens of a run that are scored, and the bytes that they stand for."""
        span = None if answer is None else find_answer(run.text, answer)
        if answer is None or span is None:
            text = self._decode(ids[max(run.start, 1) : run.stop]) if answer is None else answer.encode()
            return list(range(run.start, run.stop)), len(text)
        start, stop, size = span
        places = {run.start + n: place for n, place in enumerate(pairwise(run.offsets))}
        own_tokens = [i for i, (a, b) in places.items() if a < stop and b > start]
        later_tokens = [i for i, (a, _) in places.items() if a >= stop]
        end = next(([i] for i in later_tokens if ids[i] in self.control_ids), later_tokens)
        if run.start == 0:  # the first token of a row is not predicted
            size -= max(0, min(stop, run.offsets[1]) - start)
        return [*own_tokens, *end], size

    def _decode(self, ids: Sequence[int]) -> bytes:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).encode()


def match_answers(texts: Sequence[bytes], answers: Sequence[str | None]) -> list[str | None]:
    """The answer of each run of labeled tokens, given as `texts`; None where there is none.

    Where some answers are not trained, a run takes the next answer with which it ends.
    """
    if len(texts) == len(answers):
        return list(answers)
    matches: list[str | None] = []
    position = 0
    for text in texts:
        end = text.rstrip(CONTROL + b" \n\r\t")
        candidates = (n for n in range(position, len(answers)) if _ends_with(end, answers[n]))
        number = next(candidates, None)
        matches.append(None if number is None else answers[number])
        position = position if number is None else number + 1
    return matches


def _ends_with(text: bytes, answer: str | None) -> bool:
    if answer is None:
        return True
    spelled = answer.strip().encode()
    return text.endswith(spelled) if spelled else not text


def find_answer(text: bytes, answer: str) -> tuple[int, int, int] | None:
    """(start, stop, size) of an answer in the bytes of a run, where `size` is that of the answer in the document.

    A template may strip the answer, or leave out the thinking before it, which then does not count.
    """
    final_answer = answer.rpartition(THINKING_END)[2]
    sizes = {answer: len(answer.encode()), answer.strip(): len(answer.encode())}
    if final_answer != answer:
        sizes[final_answer.strip()] = len(final_answer.strip().encode())
    for candidate, size in sizes.items():
        spelled = candidate.encode()
        start = text.rfind(spelled) if spelled else len(text.rstrip(CONTROL + b" \n\r\t"))
        if start >= 0:
            return start, start + len(spelled), size
    return None
