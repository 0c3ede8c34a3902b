"""Noise of a text: numbers in [0, 1) that follow from the text's seed and the index of the token alone."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Noise:
    """One number per token, drawn in order from `seed`, or the given `values`; without a seed it is unpredictable."""

    def __init__(self, seed: int | None = None, values: Float[Tensor, " W"] | None = None) -> None:
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._values: list[float] = [] if values is None else values.tolist()
        self._key = self._generator.initial_seed() if values is None else hash(tuple(self._values))

    def __getitem__(self, index: int) -> float:
        while len(self._values) <= index:
            self._values.append(float(torch.rand((), dtype=torch.float64, generator=self._generator)))
        return self._values[index]

    def make_rows(self, purpose: str, indices: Sequence[int], width: int) -> Float[Tensor, "N K"]:
        """`width` further numbers for each token of `indices`, independent of those for any other purpose or token.

        A smaller width gives the first of the same numbers.
        """
        key = self._key % 2**64 * 2**64 + zlib.crc32(purpose.encode())
        rows = [np.random.Generator(np.random.Philox(key=key, counter=index << 64)).random(width) for index in indices]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, width, dtype=torch.float64)
