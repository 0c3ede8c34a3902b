"""Answers `/v1/chat/completions` in OpenAI's format, whole or as a stream."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from potstill.decode.logprobs import TokenLogprob
from potstill.decode.request import Completion, TokenEvent
from potstill.serve.request import ChatCompletionRequest
from potstill.serve.served_model import ServedModel
from potstill.serve.streaming import EventStream, close_after
from potstill.serve.usage import count_usage
from potstill.serve.worker import FINISH_REASONS, Submission


async def create_chat_completion(served: ServedModel, request: ChatCompletionRequest, http: Request) -> Response:
    """The response to a chat request.

    Raises: PotstillError for a request that this server refuses, or cannot answer now or in time.
    """
    served.check_request(request)
    num_logprobs = served.count_logprobs("top_logprobs", request.num_logprobs)
    prompt = await served.encoder.encode_chat(request)
    requests = served.make_requests(request, [prompt], request.token_limit, num_logprobs=num_logprobs)
    response = ChatResponder(served, request, len(prompt))
    submission = served.worker.submit(requests)
    if request.stream:
        return EventStream(submission, response.stream(submission))
    return JSONResponse(await close_after(submission, http.receive, response.collect(submission)))


class ChatResponder:
    """Writes the response to one chat."""

    def __init__(self, served: ServedModel, request: ChatCompletionRequest, num_prompt_tokens: int) -> None:
        self.served, self.request, self.num_prompt_tokens = served, request, num_prompt_tokens
        self.metadata = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}

    async def collect(self, submission: Submission) -> dict[str, Any]:
        """The whole response."""
        completions = await submission.read_completions()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": self._format_logprobs(completion.logprobs),
                "finish_reason": FINISH_REASONS[completion.finish_reason or "length"],
                "stop_reason": completion.stop_string,
            }
            for index, completion in enumerate(completions)
        ]
        usage = count_usage(self.num_prompt_tokens, completions)
        return {**self.metadata, "object": "chat.completion", "choices": choices, "usage": usage}

    async def stream(self, submission: Submission) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream: first the role of each choice, then its text."""
        completions = [Completion() for _ in submission.requests]
        for index in range(len(completions)):
            yield self._build_chunk(index, {"role": "assistant", "content": ""})
        async for index, event in submission.read_events():
            completions[index].add(event)
            if event.text or event.logprob or event.finish_reason:
                yield self._build_chunk(index, {"content": event.text}, event)
        if self.request.includes_usage:
            usage = count_usage(self.num_prompt_tokens, completions)
            yield {**self.metadata, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _build_chunk(self, index: int, delta: dict[str, Any], event: TokenEvent | None = None) -> dict[str, Any]:
        reason = event.finish_reason if event else None
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._format_logprobs([event.logprob]) if event and event.logprob else None,
            "finish_reason": FINISH_REASONS[reason] if reason else None,
        }
        return {**self.metadata, "object": "chat.completion.chunk", "choices": [choice], "usage": None}

    def _format_logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        k = self.request.num_logprobs
        return None if k is None else self.served.formatter.format_chat(entries, k)
