"""A judge on an OpenAI-compatible server: replies to prompts, for rewards that ask a language model."""

from collections.abc import Callable, Sequence

from potstill.core.errors import ServerError
from potstill.teachers.http_client import Address, HttpClient

# of M-Thinker's judge (arXiv:2510.07300), in its released code
TEMPERATURE, TOP_P, SEED, MAX_TOKENS = 0.6, 0.95, 10, 50


class ServedJudge:
    """Asks the model at `http://HOST:PORT/v1#MODEL` each prompt as a chat of one turn, many at once.

    Raises: UsageError for an address that is none; MissingDependency without the extra `serve`.
    """

    def __init__(self, address: str, *, max_tokens: int = MAX_TOKENS, client: HttpClient | None = None) -> None:
        self.address, self.max_tokens = Address.from_string(address), max_tokens
        self._client = client or HttpClient(self.address.url)
        self._model = self.address.model

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """The reply to each prompt; empty for a reply without text.

        Raises: ServerError for no answer, or one that is no chat completion.
        """
        if not self._model:
            self._model = self._client.submit(self._fetch_first_model()).result()
        futures = [self._client.submit(self._ask(prompt)) for prompt in prompts]
        return [str(future.result()) for future in futures]

    def close(self) -> None:
        """Cancels all requests, and closes the connections."""
        self._client.close()

    async def _ask(self, prompt: str) -> str:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "seed": SEED,
            "max_tokens": self.max_tokens,
            "model": self._model,
        }
        answer = await self._client.request("/chat/completions", body)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"the server at {self.address.url} gives no chat completion; is its path /v1, and does it chat?"
            ) from error

    async def _fetch_first_model(self) -> str:
        answer = await self._client.request("/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"the server at {self.address.url} names no model; write http://HOST:PORT/v1#MODEL"
            ) from error


def open_judge(address: str) -> Callable[[Sequence[str]], list[str]]:
    """The judge at an address, for `train.rewards.registry.get_reward`. Raises: as `ServedJudge` does."""
    return ServedJudge(address)
