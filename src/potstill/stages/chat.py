"""A conversation with a model, which forgets its oldest turns when the context is full."""

from typing import Any

from potstill.core.counts import count_noun
from potstill.core.errors import UsageError
from potstill.decode.answer_stream import AnswerStream
from potstill.stages.console import print_note
from potstill.stages.generate_options import MAX_CHAT_TOKENS, AnswerOptions
from potstill.stages.text_generator import TextGenerator


class Chat:
    """A chat with the model `model`: its `system` prompt, and the exchanges of questions and answers so far.

    Answer n is drawn with the seed of the options plus n.

    Raises: UsageError for a model without a chat template; the errors of `TextGenerator`.
    """

    def __init__(self, model: str, options: AnswerOptions) -> None:
        self.generator, self.seed = TextGenerator(model, options), options.seed
        if self.generator.prompts.template is None:
            raise UsageError(
                f"{model} has no chat template, which --chat needs; give one with --chat-template, or omit --chat"
            )
        self.max_tokens = options.max_tokens or MAX_CHAT_TOKENS
        self.system = ""
        self.exchanges: list[tuple[str, AnswerStream]] = []
        self._num_answers = 0

    def ask(self, question: str) -> AnswerStream:
        """The answer to the next question; the chat holds as much of it as is iterated.

        Where prompt and answer would exceed the context, the oldest exchanges are forgotten, and a note says so. An
        answer has room for `max_tokens`, or for half of the context if that is less.

        Raises: UsageError for a question that alone exceeds the context; DataError if the template refuses the chat,
        or for control tokens that are refused. The chat then is as before.
        """
        past = [exchange for exchange in self.exchanges if not _is_empty(exchange[1])]
        context, num_past = self.generator.context, len(past)
        least_room = min(self.max_tokens, context // 2)
        ids = self._encode(past, question)
        while past and len(ids) + least_room > context:
            past = past[1:]
            ids = self._encode(past, question)
        room = context - len(ids)
        if room < 1:
            raise UsageError(
                f"your message makes a prompt of {len(ids)} tokens, and {self.generator.name} has {context} tokens of "
                f"context; shorten it"
            )
        if forgotten := num_past - len(past):
            print_note(
                f"the context of {context} tokens is full; the chat has forgotten "
                f"{count_noun(forgotten, 'exchange')} at its beginning"
            )
        answer = self.generator.answer(ids, max_tokens=min(self.max_tokens, room), seed=self.seed + self._num_answers)
        self._num_answers += 1
        self.exchanges = [*past, (question, answer)]
        return answer

    def clear(self) -> None:
        """Forgets all exchanges, and keeps the system prompt."""
        self.exchanges = []

    def _encode(self, exchanges: list[tuple[str, AnswerStream]], question: str) -> list[int]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for past_question, answer in exchanges:
            messages.append({"role": "user", "content": past_question})
            messages.append({"role": "assistant", "content": answer.text})
        return self.generator.encode_chat([*messages, {"role": "user", "content": question}])


def _is_empty(answer: AnswerStream) -> bool:
    """Whether an answer was stopped before its first word, so that its question is not part of the chat."""
    return answer.completion.finish_reason in (None, "cancelled") and not answer.text
