"""The model that a server serves, with everything that its routes share."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from potstill.core.errors import NotFound, UsageError
from potstill.decode.elastic_engine import ElasticEngine
from potstill.decode.engine import Engine
from potstill.decode.generation_config import make_filters
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.decode.speculative import Speculation
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.models.elastic import get_sizes
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel
from potstill.serve.auto_size import AutoSize
from potstill.serve.logprobs import LogprobFormatter
from potstill.serve.metrics import ServerMetrics
from potstill.serve.options import MAX_CONTEXT, ServeLimits
from potstill.serve.prompts import PromptEncoder
from potstill.serve.request import GenerationRequest, list_unknown_fields
from potstill.serve.worker import EngineWorker

Speculate = Callable[[ModelRunner], Speculation | None]
log = logging.getLogger("potstill")
MAX_FIELD_NOTES = 20  # unknown fields that the log names


def no_speculation(runner: ModelRunner) -> None:
    """Drafts nothing."""


class ServedModel:
    """A loaded model under the name `name`, its engine, and what requests may ask of it.

    `sampling_defaults` replace what a request that samples leaves open. `speculate` says what drafts tokens.
    `auto_size` chooses the size of an elastic model by the load, without drafts.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        name: str,
        limits: ServeLimits,
        sampling_defaults: Mapping[str, float],
        speculate: Speculate = no_speculation,
        auto_size: AutoSize | None = None,
    ) -> None:
        self.name, self.limits, self.sampling_defaults = name, limits, dict(sampling_defaults)
        self.vocabulary, self.tokenizer = loaded.vocabulary, loaded.tokenizer
        self.context = choose_context(loaded, limits.context)
        self.stop_tokens = find_stop_tokens(loaded.model, loaded.tokenizer)
        self.start_time = int(time.time())
        self.encoder = PromptEncoder(loaded, context=self.context)
        self.formatter = LogprobFormatter(loaded.tokenizer)
        self.metrics = ServerMetrics(name)
        self.worker = EngineWorker(
            self._make_engine(loaded, speculate, auto_size),
            self.metrics,
            max_answers=limits.slots + limits.max_queue,
            timeout=limits.timeout,
        )
        self._unknown_fields: set[str] = set()

    def _make_engine(
        self, loaded: LoadedModel, speculate: Speculate, auto_size: AutoSize | None
    ) -> Engine | ElasticEngine:
        slots, context = self.limits.slots, self.context
        if auto_size is not None:
            engine = auto_size.make_engine(loaded, slots=slots, context=context)
            shares = [size.share for size in get_sizes(loaded.model)]
            self.metrics.add_size(lambda: shares[engine.schedule.size])
            return engine
        runner = ModelRunner(loaded.model, slots=slots, context=context, vocabulary=self.vocabulary)
        return Engine(runner, loaded.tokenizer, speculation=speculate(runner))

    def check_request(self, request: GenerationRequest) -> None:
        """Refuse another model; note the fields that this server ignores.

        Raises: NotFound.
        """
        if request.model not in (None, self.name):
            raise NotFound(f"the model {request.model!r} does not exist; this server has {self.name!r}")
        for field in list_unknown_fields(request):
            name = field[:40].encode("ascii", "backslashreplace").decode()
            if name not in self._unknown_fields and len(self._unknown_fields) < MAX_FIELD_NOTES:
                self._unknown_fields.add(name)
                log.warning("note: requests have the field %r, which this server does not know and ignores", name)

    def count_logprobs(self, field: str, number: int | None) -> int | None:
        """How many likeliest tokens a request gets for the `number` in a field; -1 is the whole vocabulary.

        Raises: UsageError for more than the server gives.
        """
        if number is None:
            return None
        wanted = self.vocabulary if number < 0 else min(number, self.vocabulary)
        most = self.vocabulary if self.limits.max_logprobs < 0 else self.limits.max_logprobs
        if wanted > most:
            raise UsageError(
                f"{field} is {number}, and the maximum allowed is {most}; ask for fewer, or start the server with a "
                f"larger --max-logprobs"
            )
        return wanted

    def make_requests(
        self,
        request: GenerationRequest,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        *,
        num_logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> list[DecodeRequest]:
        """A request to the engine for each choice of each prompt, in this order.

        Raises: UsageError if a prompt and its answer exceed the context.
        """
        sampling = self._choose_sampling(request)
        limits = [self.encoder.limit_tokens(prompt, max_tokens) for prompt in prompts]
        return [
            DecodeRequest(
                prompt=prompt,
                max_new_tokens=limit,
                sampling=sampling,
                stop_strings=request.stop_strings,
                seed=None if request.seed is None else (request.seed + choice) % 2**63,
                num_logprobs=num_logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for prompt, limit in zip(prompts, limits, strict=True)
            for choice in range(request.num_choices)
        ]

    def _choose_sampling(self, request: GenerationRequest) -> Sampling:
        """The settings of the request, and where it samples the server's defaults for what it leaves open."""
        settings = {"temperature": 1.0, **self.sampling_defaults, **request.sampling_settings}
        temperature = settings["temperature"]
        return Sampling(
            vocabulary=self.vocabulary,
            stop=(frozenset() if request.ignore_eos else self.stop_tokens) | frozenset(request.stop_token_ids or ()),
            temperature=temperature,
            filters=make_filters(settings if temperature > 0 else request.sampling_settings),
        )


def choose_context(loaded: LoadedModel, context: int | None) -> int:
    """The tokens of a prompt with its answer: those that --context gives, or at most `MAX_CONTEXT` of the model's.

    Raises: UsageError for more than the model has.
    """
    model_context = get_max_context(loaded.model)
    if context is None:
        return min(model_context, MAX_CONTEXT)
    if context > model_context:
        raise UsageError(f"--context is {context}, and {loaded.name} has {model_context} tokens of context; lower it")
    return context
