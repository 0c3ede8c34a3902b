"""The positions of a pass: where documents begin, rotary angles, masks, and the reports of parts."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from potstill.core.blueprint import Rotary
from potstill.core.errors import UnsupportedModel
from potstill.layers.rotary import rotary_cos_sin
from potstill.ops.attention import Lengths, Prefixes, causal_mask, continuation_starts, document_starts

CosSin = tuple[Tensor, Tensor]
Reports = MutableMapping[str, list[Tensor]]


@dataclass
class Positions:
    """The positions of one pass: `ids [B T]`, of documents of `lengths`, or of text after `past_length` tokens.

    With `lengths` no query sees another document, but for the `prefixes` of continuations. Without them (a state has
    earlier tokens, or `token_mask [B S]` marks the keys that are not padding) `get_mask` gives the dense mask.
    `distances` says how many positions before each token every key of a state lies, and is -1 where the token does not
    see the key. With `key_ids` tokens are missing between the keys, so windows count by these positions of the keys.
    All layers share the same angles and masks. `reports` collects the tensors that parts report, layer by layer, under
    the names that it already has.
    """

    ids: Int[Tensor, "B T"]
    rotary: Rotary
    context: int
    lengths: Lengths | None = None
    prefixes: Prefixes | None = None
    past_length: int = 0
    token_mask: Bool[Tensor, "B S"] | None = None
    distances: Int[Tensor, "B T S"] | None = None
    key_ids: Int[Tensor, "B S"] | None = None
    reports: Reports = field(default_factory=dict)
    _cos_sin_cache: dict[tuple[Rotary, int, torch.dtype], CosSin] = field(default_factory=dict)
    _mask_cache: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _starts: Bool[Tensor, "B T"] | None = None

    @property
    def is_token(self) -> Bool[Tensor, "B T"]:
        """False at padding."""
        if self.token_mask is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return self.token_mask[:, self.past_length : self.past_length + self.ids.shape[1]]

    @property
    def starts(self) -> Bool[Tensor, "B T"]:
        """True at the first token of each document that is not padding; False in text that continues a state.

        A recurrence that forgets its memory here, and a convolution that reads zeros before it, see no padding on the
        left and no other document. They would not see the prompt of a continuation.

        Raises: UnsupportedModel where documents share a prompt.
        """
        if self.prefixes is not None:
            _refuse_shared_prompts()
        return self._get_starts()

    def check_padding(self) -> None:
        """Checks that padded rows hold no continuations, for which `get_mask` has no mask.

        Raises: UnsupportedModel.
        """
        is_padded = self.token_mask is not None and self.past_length == 0
        if is_padded and bool((continuation_starts(self.ids) & self.is_token).any()):
            _refuse_shared_prompts()

    def report(self, name: str, value: Tensor) -> None:
        """Adds `value [B T ...]` to the reports called `name`, if this pass collects them."""
        if name in self.reports:
            self.reports[name].append(value)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # computed once for all layers, so in none of them
    def get_cos_sin(self, head_dim: int, dtype: torch.dtype, rotary: Rotary | None = None) -> CosSin:
        """Cosines and sines `[B 1 T K]` of the angles of `rotary`, by default the model's."""
        rope = rotary or self.rotary
        key = (rope, head_dim, dtype)
        if key not in self._cos_sin_cache:
            self._cos_sin_cache[key] = rotary_cos_sin(
                self.ids, rope, head_dim=head_dim, context=self.context, dtype=dtype
            )
        return self._cos_sin_cache[key]

    def get_mask(self, keys: int, window: int | None) -> Bool[Tensor, "B 1 T {keys}"] | None:
        """True for the keys that each query may see, or None if it may see all of them.

        A state may hold fewer keys than it has positions; they are those of the last ones.
        """
        key = (keys, window)
        if key not in self._mask_cache:
            self._mask_cache[key] = self._build_mask(keys, window)
        return self._mask_cache[key]

    def _get_starts(self) -> Bool[Tensor, "B T"]:
        if self._starts is None:
            self._starts = self._find_starts()
        return self._starts

    def _find_starts(self) -> Bool[Tensor, "B T"]:
        if self.distances is not None:
            return self.ids == 0
        is_start = document_starts(self.ids)
        if self.past_length:
            is_start = torch.zeros_like(is_start)  # with a past, each row holds one document
        if self.token_mask is None:
            return is_start
        is_token, document = self.is_token, is_start.cumsum(1) + bool(self.past_length)
        last_document = (document * is_token).cummax(1).values  # of the tokens so far
        earlier_document = self.token_mask[:, : self.past_length].any(1, keepdim=True)
        return is_token & (document > torch.cat([earlier_document, last_document[:, :-1]], 1))

    def _build_mask(self, keys: int, window: int | None) -> Tensor | None:
        if self.distances is not None:
            is_visible = self.distances >= 0
            return (is_visible if window is None else is_visible & (self.distances < window))[:, None]
        size, device = self.ids.shape[1], self.ids.device
        end = self.past_length + size
        if self.token_mask is None and size == 1 and keys <= end and (window is None or keys <= window):
            return None
        width = max(keys, end)
        mask = torch.zeros(size, width, dtype=torch.bool, device=device)
        mask[:, :end] = causal_mask(size, end, window=window, device=device)
        mask = mask.expand(len(self.ids), 1, size, width)
        if self.token_mask is None:
            return mask[..., width - keys :]
        if self.past_length == 0:  # with a past, each row holds one document
            document = document_starts(self.ids).cumsum(1)
            mask = mask & (document[:, :, None] == document[:, None, :])[:, None]
        mask = mask & self.token_mask[:, None, None, :]
        diagonal = torch.arange(width, device=device) == torch.arange(self.past_length, end, device=device)[:, None]
        # a padding token sees itself, so that no row of the softmax is empty and none is NaN
        return (mask | diagonal)[..., width - keys :]


def _refuse_shared_prompts() -> NoReturn:
    raise UnsupportedModel(
        "a recurrence, a convolution or a padded batch cannot share a prompt; repeat it before each of its "
        "continuations with potstill.ops.layout.repeat_prompts"
    )
