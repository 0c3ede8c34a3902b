"""The decoding loop: texts enter free slots, every step gives each text a token, and finished texts leave.

A step reads prompts, as many tokens as `PROMPT_TOKENS` allow, and then one new token of every text in a single pass.
The tokens of a text follow from its own noise, so they depend on no other text in the batch.
With a drafter a step verifies a draft of each text, and a text may gain several tokens (see `speculative`). Several
models may write together (see `drawing`).
Of a model's generation config the loop reads nothing. Greedy decoding is the argmax of the model's own logits.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.decode.active_text import ActiveText
from potstill.decode.drafters.drafter import Draft
from potstill.decode.engine_stats import EngineStats
from potstill.decode.logprobs import TokenLogprob, compute_token_logprobs
from potstill.decode.noise import Noise
from potstill.decode.prefix_cache import PrefixCache
from potstill.decode.request import Completion, DecodeRequest, FinishReason, TokenEvent
from potstill.decode.request_queue import RequestQueue
from potstill.decode.runner import ModelRunner
from potstill.decode.speculative import Speculation, accept_drafts, pack_drafts, select_rows
from potstill.decode.text_stream import TextStream
from potstill.ops.acceptance import Acceptance

PROMPT_TOKENS = 2048  # of prompts in one step, before the texts that already write get their tokens


class Engine:
    """Decodes requests with `runner`, as many at a time as it has slots.

    `tokenizer` makes the text of the events; without one they hold tokens only. `partners` are (weight, runner) pairs
    of further models with as many slots; the weight of the first is what remains of 1. `speculation` drafts tokens.
    With `reuse_prefix` a free slot keeps its text, and a prompt that begins alike is read from there on.

    Raises: UsageError for a draft longer than the context; UnsupportedModel if a model cannot verify drafts.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        partners: Sequence[tuple[float, ModelRunner]] = (),
        speculation: Speculation | None = None,
        reuse_prefix: bool = False,
    ) -> None:
        self.runner, self.tokenizer, self.speculation = runner, tokenizer, speculation
        self.weights = [1.0 - sum(weight for weight, _ in partners), *(weight for weight, _ in partners)]
        self.runners = [runner, *(partner for _, partner in partners)]
        for each_runner in self.runners:
            if speculation is not None:
                speculation.check(each_runner)
        self.stats = EngineStats()
        needs_whole_prompt = bool(partners) or (speculation is not None and speculation.drafter.takes_hidden)
        reuse_prefix = reuse_prefix and not needs_whole_prompt and runner.edits is None
        self._prefixes = PrefixCache(runner) if reuse_prefix else None
        self._free_slots = list(range(runner.num_slots))
        self._queue = RequestQueue()
        self._active: dict[int, ActiveText] = {}  # by request id, in the order of arrival
        self._events: list[TokenEvent] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` would still give an event."""
        return bool(self._queue or self._active or self._events)

    @property
    def num_active(self) -> int:
        """The number of texts in slots."""
        return len(self._active)

    @property
    def num_queued(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._queue)

    def add(self, request: DecodeRequest) -> int:
        """Queues a request; returns its id. Raises: UsageError, as `check_request` does."""
        return self.add_samples([request])[0]

    def add_samples(self, requests: Sequence[DecodeRequest]) -> list[int]:
        """Queues requests with one prompt, which is read once; returns their ids. They start together.

        Raises: UsageError for different prompts or `prompt_logprobs`, more requests than slots, and as `check_request`.
        """
        for request in requests:
            self.check_request(request)
        for name in ("prompt", "prompt_logprobs"):  # of the one reading
            if any(getattr(request, name) != getattr(requests[0], name) for request in requests):
                raise UsageError(f"the samples have different values of {name}; add the requests one by one")
        if len(requests) > self.runner.num_slots:
            raise UsageError(f"{len(requests)} samples of a prompt do not fit in {self.runner.num_slots} slots")
        return self._queue.add(requests)

    def check_request(self, request: DecodeRequest) -> None:
        """Refuse a request that can never be answered.

        Raises: UsageError for a prompt without a token, or a text that may exceed the context, and for stop strings
        without a tokenizer.
        """
        if not len(request.prompt):
            raise UsageError("the prompt has no token; write at least one word")
        context = min(runner.context for runner in self.runners)
        if len(request.prompt) + request.max_new_tokens > context:
            raise UsageError(
                f"{len(request.prompt)} tokens of prompt and {request.max_new_tokens} new ones exceed the {context} "
                f"tokens of context; shorten the prompt or lower the number of new tokens"
            )
        if request.stop_strings and self.tokenizer is None:
            raise UsageError("stop strings need the text of the tokens; give the engine a tokenizer")

    def cancel(self, request_id: int) -> None:
        """Ends a request, queued or active; the next step gives its last event. An unknown id changes nothing."""
        if request_id in self._active:
            self._release(self._active[request_id])
        elif not self._queue.remove(request_id):
            return
        self._events.append(TokenEvent(request_id=request_id, token=None, finish_reason="cancelled"))

    def step(self) -> list[TokenEvent]:
        """Reads prompts and gives every text its next token; returns the events since the last step."""
        self._admit()
        start = time.perf_counter()
        self._read_prompts()
        prompt_end = time.perf_counter()
        self._decode()
        self.stats.prompt_seconds += prompt_end - start
        self.stats.seconds += time.perf_counter() - prompt_end
        events, self._events = self._events, []
        return events

    def run(self) -> dict[int, Completion]:
        """Steps until no work is left; the completions by request id."""
        completions: dict[int, Completion] = {}
        while self.has_work:
            for event in self.step():
                completions.setdefault(event.request_id, Completion()).add(event)
        return completions

    def _admit(self) -> None:
        for group in self._queue.take_groups(len(self._free_slots)):
            leader: ActiveText | None = None
            for request_id, request in group:
                self._active[request_id] = self._make_text(request_id, request, leader)
                leader = leader or self._active[request_id]

    def _make_text(self, request_id: int, request: DecodeRequest, leader: ActiveText | None) -> ActiveText:
        """A request in a free slot, behind the text that reads its prompt."""
        slot = self._free_slots.pop(0)
        for runner in self.runners:
            runner.begin(slot, request.prompt)
        reads_anew = leader is not None or request.prompt_logprobs is not None
        return ActiveText(
            request_id,
            request,
            slot,
            Noise(request.seed, request.noise),
            None if self.tokenizer is None else TextStream(self.tokenizer, request.stop_strings),
            list(request.prompt),
            num_read=0 if self._prefixes is None else self._prefixes.reuse(slot, () if reads_anew else request.prompt),
            prompt_logprobs=None if request.prompt_logprobs is None else [],
            leader=leader,
        )

    def _read_prompts(self) -> None:
        budget = PROMPT_TOKENS
        for text in list(self._active.values()):
            while budget > 0 and not text.is_prompt_read and text.leader is None:
                budget -= self._read_prompt_chunk(text)

    def _read_prompt_chunk(self, text: ActiveText) -> int:
        """Reads the next chunk of a prompt; after the last one, writes the first token. Returns the tokens read."""
        chunk_size = min(runner.chunk_size for runner in self.runners)
        prompt = text.request.prompt
        chunk = prompt[text.num_read : text.num_read + chunk_size]
        outputs = [runner.prefill(text.slot, chunk) for runner in self.runners]
        if text.prompt_logprobs is not None:
            next_ids = list(prompt[text.num_read + 1 : text.num_read + len(chunk) + 1])
            logits = self.runner.compute_logits(outputs[0].features[: len(next_ids)])
            text.prompt_logprobs += compute_token_logprobs(logits, next_ids, text.request.prompt_logprobs or 0)
        text.num_read += len(chunk)
        self.stats.prompt_tokens += len(chunk)
        if self.speculation is not None and self.speculation.drafter.takes_hidden:
            text.prompt_hidden.append(outputs[0].features)
        if text.is_prompt_read:
            texts = [text, *self._share_prompt(text)]
            self._start_drafter(texts)
            self._write_first_tokens(texts, [output.logits for output in outputs])
        return len(chunk)

    def _share_prompt(self, leader: ActiveText) -> list[ActiveText]:
        """Gives the prompt that a text has read to those that waited for it; returns these."""
        followers = [text for text in self._active.values() if text.leader is leader]
        for text in followers:
            for runner in self.runners:
                runner.copy(leader.slot, text.slot)
            text.num_read, text.leader = leader.num_read, None
            text.prompt_logprobs = leader.prompt_logprobs and [*leader.prompt_logprobs]
        return followers

    def _start_drafter(self, texts: Sequence[ActiveText]) -> None:
        """Gives the drafter the prompt of texts, which the first one has read, with its hidden states if it takes
        them."""
        if self.speculation is None:
            return
        drafter, leader = self.speculation.drafter, texts[0]
        hidden = torch.cat(leader.prompt_hidden) if drafter.takes_hidden else None
        for text in texts:
            drafter.start(text.slot, text.request.prompt, hidden)
        leader.prompt_hidden.clear()

    def _write_first_tokens(self, texts: Sequence[ActiveText], logits: Sequence[Float[Tensor, " V"]]) -> None:
        """Writes the token after the one prompt of all texts, from each model's logits there."""
        writers = [text for text in texts if text.request.max_new_tokens > 0]
        for text in texts:
            if text.request.max_new_tokens == 0:
                self._add_event(text, reason="length")
        if writers:
            drafts = [Draft()] * len(writers)
            rows = [model_logits.expand(len(writers), -1) for model_logits in logits]
            self._write(writers, drafts, accept_drafts(writers, drafts, rows, self.weights), rows[0])

    def _decode(self) -> None:
        """One pass over the last token of every text whose prompt is read, and over its draft."""
        texts = [text for text in self._active.values() if text.is_prompt_read]
        if not texts:
            return
        drafts = self._propose(texts)
        tokens, parents = pack_drafts([text.ids[-1] for text in texts], drafts, device=self.runner.device)
        slots, start = [text.slot for text in texts], time.perf_counter()
        outputs = [runner.forward(slots, tokens, parents) for runner in self.runners]
        logits = [select_rows(output.logits, drafts) for output in outputs]
        acceptances = accept_drafts(texts, drafts, logits, self.weights, typical=self._is_typical)
        self.stats.steps += 1
        for row, (text, acceptance) in enumerate(zip(texts, acceptances, strict=True)):
            positions = [0, *(node + 1 for node in acceptance.path)]
            for runner in self.runners:
                runner.commit(text.slot, positions)
            hidden = outputs[0].hidden
            self._accept(text, drafts[row], acceptance, None if hidden is None else hidden[row, positions])
        if self.speculation is not None:
            self.speculation.record(drafts, acceptances, verify_seconds=time.perf_counter() - start)
        self._write(texts, drafts, acceptances, logits[0])

    @property
    def _is_typical(self) -> bool:
        return self.speculation is not None and self.speculation.typical

    def _propose(self, texts: Sequence[ActiveText]) -> list[Draft]:
        return [Draft() for _ in texts] if self.speculation is None else self.speculation.propose(texts)

    def _accept(self, text: ActiveText, draft: Draft, acceptance: Acceptance, hidden: Tensor | None) -> None:
        if self.speculation is not None:
            self.speculation.drafter.accept(text.slot, acceptance.path, acceptance.token, hidden)
            self.stats.record(draft, acceptance.path)

    def _write(
        self,
        texts: Sequence[ActiveText],
        drafts: Sequence[Draft],
        acceptances: Sequence[Acceptance],
        logits: Float[Tensor, "N V"],
    ) -> None:
        """Makes the events of the tokens that each text keeps, up to its end."""
        rows = logits.split([len(draft.tokens) + 1 for draft in drafts])
        for text, draft, (path, token), text_logits in zip(texts, drafts, acceptances, rows, strict=True):
            tokens, k = [*(draft.tokens[node] for node in path), token], text.request.num_logprobs
            logprobs: Iterator[TokenLogprob | None] = repeat(None)
            if k is not None:
                path_logits = text_logits[[0, *(node + 1 for node in path)]]
                temperature = text.request.logprob_temperature
                logprobs = compute_token_logprobs(path_logits, tokens, k, temperature=temperature)
            for n, (new_token, logprob) in enumerate(zip(tokens, logprobs, strict=False)):
                if not self._emit(text, new_token, logprob, drafted=n < len(path)):
                    break

    def _emit(
        self, text: ActiveText, token: int, logprob: TokenLogprob | None = None, *, drafted: bool = False
    ) -> bool:
        """Appends a token to a text and makes its event; whether the text goes on."""
        text.ids.append(token)
        self.stats.tokens += 1
        piece = "" if text.stream is None else text.stream.push(token)
        stop_string = None if text.stream is None else text.stream.stop_string
        reason: FinishReason | None = None
        if token in text.request.sampling.stop or stop_string is not None:
            reason = "stop"
        elif text.num_new_tokens >= text.request.max_new_tokens:
            reason = "length"
        self._add_event(text, token, piece, logprob, reason=reason, drafted=drafted)
        return reason is None

    def _add_event(
        self,
        text: ActiveText,
        token: int | None = None,
        piece: str = "",
        logprob: TokenLogprob | None = None,
        *,
        reason: FinishReason | None,
        drafted: bool = False,
    ) -> None:
        """Makes the next event of a text; with a `reason` it is the last one, and the slot becomes free."""
        stream, stop_string = text.stream, None
        if reason is not None and stream is not None:
            piece += stream.flush()
            stop_string = stream.stop_string
        self._events.append(
            TokenEvent(
                request_id=text.request_id,
                token=token,
                text=piece,
                logprob=logprob,
                finish_reason="stop" if stop_string is not None else reason,
                stop_string=stop_string,
                drafted=drafted,
                prompt_logprobs=_take_prompt_logprobs(text),
            )
        )
        if reason is not None:
            self._release(text)

    def _release(self, text: ActiveText) -> None:
        del self._active[text.request_id]
        followers = [follower for follower in self._active.values() if follower.leader is text]
        for follower in followers:  # its prompt is not read, so the next one reads it
            follower.leader = None if follower is followers[0] else followers[0]
        if self._prefixes is not None:
            self._prefixes.store(text.slot, text.ids)
        else:
            for runner in self.runners:
                runner.free(text.slot)
        if self.speculation is not None:
            self.speculation.drafter.free(text.slot)
        self._free_slots.append(text.slot)


def _take_prompt_logprobs(text: ActiveText) -> list[TokenLogprob] | None:
    logprobs, text.prompt_logprobs = text.prompt_logprobs, None
    return logprobs
