"""The metrics of the server for Prometheus, by the names of vLLM with the prefix `potstill`."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)  # seconds
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)  # seconds
ANSWER_BUCKETS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)  # seconds


class ServerMetrics:
    """The counters, gauges and histograms of one server; each has the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.running = self._gauge("num_requests_running", "Answers that are being generated.")
        self.waiting = self._gauge("num_requests_waiting", "Answers that wait for a slot.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._draft_counts = (0, 0)
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens that the draft proposed.")
        self._accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from the request to the first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of an answer.", TOKEN_BUCKETS
        )
        self.request_latency = self._histogram(
            "e2e_request_latency_seconds", "Time from the request to the last token.", ANSWER_BUCKETS
        )
        self._success = Counter(
            "potstill:request_success", "Answers by the reason of their end.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._rejected = self._counter("requests_rejected", "Requests that got status 429.")

    def count_token(self, seconds: float, *, is_first: bool) -> None:
        """Counts a new token, `seconds` after the request or after the token before it."""
        self.generation_tokens.inc()
        (self.time_to_first_token if is_first else self.inter_token_latency).observe(seconds)

    def count_answer(self, reason: str, num_prompt_tokens: int, seconds: float) -> None:
        """Counts an answer that ended for a reason: stop, length or abort."""
        self.prompt_tokens.inc(num_prompt_tokens)
        self.request_latency.observe(seconds)
        self._success.labels(self._model_name, reason).inc()

    def count_rejection(self) -> None:
        """Counts a request that found the queue full."""
        self._rejected.inc()

    def set_draft_tokens(self, num_drafted: int, num_accepted: int) -> None:
        """Sets the counts of tokens that the draft proposed, and of those that were accepted."""
        self._draft_tokens.inc(num_drafted - self._draft_counts[0])
        self._accepted_tokens.inc(num_accepted - self._draft_counts[1])
        self._draft_counts = (num_drafted, num_accepted)

    def add_size(self, read: Callable[[], float]) -> None:
        """Adds the gauge of an elastic model's size, whose share `read` returns."""
        self.track(self._gauge("size", "Share of the size that new answers get."), read)

    def track(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Lets a gauge show the value that `read` returns at each scrape."""
        gauge.set_function(read)

    def export(self) -> bytes:
        """All metrics in Prometheus' text format."""
        content: bytes = generate_latest(self.registry)
        return content

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"potstill:{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"potstill:{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"potstill:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
        return metric.labels(self._model_name)
