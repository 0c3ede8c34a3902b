"""Answers `/v1/completions` in the formats of OpenAI's legacy endpoint and of vLLM, whole or as a stream."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from potstill.decode.logprobs import TokenLogprob
from potstill.decode.request import Completion, TokenEvent
from potstill.serve.request import CompletionRequest
from potstill.serve.served_model import ServedModel
from potstill.serve.streaming import EventStream, close_after
from potstill.serve.usage import count_usage
from potstill.serve.worker import FINISH_REASONS, Submission


async def create_completion(served: ServedModel, request: CompletionRequest, http: Request) -> Response:
    """The response to a completion request.

    Raises: PotstillError for a request that this server refuses, or cannot answer now or in time.
    """
    served.check_request(request)
    num_logprobs = served.count_logprobs("logprobs", request.logprobs)
    prompt_logprobs = served.count_logprobs("prompt_logprobs", request.prompt_logprobs)
    wanted = [k for k in (prompt_logprobs, num_logprobs if request.echo else None) if k is not None]
    prompts = await served.encoder.encode_prompts(request)
    requests = served.make_requests(
        request, prompts, request.token_limit, num_logprobs=num_logprobs, prompt_logprobs=max(wanted, default=None)
    )
    response = CompletionResponder(served, request, prompts)
    submission = served.worker.submit(requests)
    if request.stream:
        return EventStream(submission, response.stream(submission))
    return JSONResponse(await close_after(submission, http.receive, response.collect(submission)))


class CompletionResponder:
    """Writes the response to one request: choice i of prompt p has the index `p * n + i`."""

    def __init__(self, served: ServedModel, request: CompletionRequest, prompts: list[list[int]]) -> None:
        self.served, self.request, self.prompts = served, request, prompts
        self.metadata = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    async def collect(self, submission: Submission) -> dict[str, Any]:
        """The whole response."""
        completions = await submission.read_completions()
        choices = [self._build_choice(index, completion) for index, completion in enumerate(completions)]
        return {**self.metadata, "choices": choices, "usage": self._count_usage(completions)}

    async def stream(self, submission: Submission) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream."""
        completions = [Completion() for _ in submission.requests]
        offsets = [0] * len(completions)
        async for index, event in submission.read_events():
            is_first = not completions[index].tokens
            completions[index].add(event)
            choice, offsets[index] = self._build_delta(index, event, offsets[index], is_first=is_first)
            if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
                yield {**self.metadata, "choices": [choice], "usage": None}
        if self.request.includes_usage:
            yield {**self.metadata, "choices": [], "usage": self._count_usage(completions)}

    def _count_usage(self, completions: list[Completion]) -> dict[str, int]:
        return count_usage(sum(map(len, self.prompts)), completions)

    def _build_choice(self, index: int, completion: Completion) -> dict[str, Any]:
        request, k = self.request, self.request.prompt_logprobs
        prompt_entries = completion.prompt_logprobs or ()
        return {
            "index": index,
            "text": self._get_echo(index) + completion.text,
            "logprobs": self._format_logprobs(index, completion.logprobs, prompt_entries, echoes=bool(request.echo)),
            "finish_reason": FINISH_REASONS[completion.finish_reason or "length"],
            "stop_reason": completion.stop_string,
            "prompt_logprobs": None if k is None else self._format_prompt(prompt_entries, k),
        }

    def _build_delta(self, index: int, event: TokenEvent, offset: int, *, is_first: bool) -> tuple[dict[str, Any], int]:
        """The choice of a chunk, and the offset of the text after it."""
        echoes = is_first and bool(self.request.echo)
        entries = [event.logprob] if event.logprob else []
        logprobs = self._format_logprobs(index, entries, event.prompt_logprobs or (), echoes=echoes, offset=offset)
        tokens = logprobs["tokens"] if logprobs else []
        choice = {
            "index": index,
            "text": (self._get_echo(index) if echoes else "") + event.text,
            "logprobs": logprobs if tokens else None,
            "finish_reason": FINISH_REASONS[event.finish_reason] if event.finish_reason else None,
            "stop_reason": event.stop_string,
        }
        return choice, offset + sum(map(len, tokens))

    def _get_echo(self, index: int) -> str:
        """The text of the prompt, if the request wants it."""
        if not self.request.echo:
            return ""
        number = index // self.request.num_choices
        prompt = self.request.prompts[number]
        return prompt if isinstance(prompt, str) else str(self.served.tokenizer.decode(self.prompts[number]))

    def _format_logprobs(
        self,
        index: int,
        entries: list[TokenLogprob],
        prompt_entries: Any,
        *,
        echoes: bool,
        offset: int = 0,
    ) -> dict[str, Any] | None:
        """The log-probabilities of new tokens, with `echoes` after those of the prompt."""
        if self.request.logprobs is None:
            return None
        all_entries: list[TokenLogprob | None] = list(entries)
        tokens = [entry.token for entry in entries]
        if echoes:
            prompt = self.prompts[index // self.request.num_choices]
            all_entries, tokens = [None, *prompt_entries, *entries], [*prompt, *tokens]
        return self.served.formatter.format_completion(tokens, all_entries, self.request.logprobs, offset=offset)

    def _format_prompt(self, entries: Any, k: int) -> list[dict[str, Any] | None]:
        return self.served.formatter.format_prompt(entries, self.served.vocabulary if k < 0 else k)
