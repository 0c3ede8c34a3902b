"""Chooses how a model reads tokens: the fastest reader that gives its own hidden states on a short example."""

import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.decode.native.library import load_library
from potstill.decode.native.reader import NativeReader
from potstill.decode.native.ternary import rounds_activations
from potstill.decode.readers import Reader, RowReader, compute_features
from potstill.decode.slot_reader import SlotReader
from potstill.models.eval_mode import eval_mode
from potstill.models.probing import is_close, make_probe_ids
from potstill.models.signals import ModelProbe

log = logging.getLogger("potstill")
ReaderClass = type[NativeReader] | type[SlotReader] | type[RowReader]
PROBE_LENGTHS = (5, 11)
# Where activations are rounded to 8 bits, the order of a sum can move one by a whole step, and later layers amplify it:
# two right passes of a ternary SmolLM2 before its training differ by 2 % in float32 and by 17 % in bfloat16.
MAX_ROUNDING = 0.5
_choices: "weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[torch.dtype, str], ReaderClass]]"
_choices = weakref.WeakKeyDictionary()


def choose_reader(
    model: PreTrainedModel, probe: ModelProbe, num_slots: int, vocabulary: int, *, quantize: bool = False
) -> Reader:
    """`NativeReader` for networks with code in C, else `SlotReader`, or `RowReader` if texts cannot share buffers.

    Raises: UsageError with `quantize` for a model without code in C.
    """
    key = (model.dtype, model.device.type)
    choices = _choices.setdefault(model, {})
    if key not in choices:
        choices[key] = _find_reader_class(model, probe)
        log.info("%s decodes with %s", type(model).__name__, choices[key].__name__)
    reader_class = choices[key]
    if issubclass(reader_class, NativeReader):
        return reader_class(model, probe, num_slots, vocabulary, quantize=quantize)
    if quantize:
        raise UsageError(
            f"{type(model).__name__} cannot decode in int8 here; that needs the CPU, a C compiler, and a model of the "
            f"family Llama, Qwen, Mistral or Gemma 3"
        )
    if issubclass(reader_class, SlotReader):
        return reader_class(model, probe, num_slots, vocabulary)
    return reader_class(model, probe, vocabulary)


@torch.no_grad()
def _find_reader_class(model: PreTrainedModel, probe: ModelProbe) -> ReaderClass:
    example = _ProbeExample(model, probe)
    can_be_native = probe.has_head_on_hidden_states and model.device.type == "cpu" and load_library() is not None
    if can_be_native and example.is_reproduced(lambda: NativeReader(model, probe, 2, vocabulary=0)):
        return NativeReader
    if probe.takes_position_ids and example.is_reproduced(lambda: SlotReader(model, probe, 2, vocabulary=0)):
        return SlotReader
    return RowReader


class _ProbeExample:
    """Two texts of different lengths, each with a tree of three tokens: the last hidden states of its two paths.

    A reader without trees reads the first path, keeps its first token, and then reads the end of the second path.
    """

    def __init__(self, model: PreTrainedModel, probe: ModelProbe) -> None:
        self.model, self.probe = model, probe
        self.device = next(model.parameters()).device
        window = getattr(model.config.get_text_config(), "window_size", None)  # GPT-Neo: no mask of ours holds it
        self.lengths = (PROBE_LENGTHS[0], PROBE_LENGTHS[1] + (window if isinstance(window, int) else 0))
        self.texts = [
            make_probe_ids(model, length=length + 3, seed=length)[0].to(self.device) for length in self.lengths
        ]

    def is_reproduced(self, make_reader: Callable[[], SlotReader]) -> bool:
        """Whether a reader gives the features of the model itself, which reads each path anew."""
        try:
            with eval_mode(self.model):
                features, expected = self._read(make_reader()), self._compute_expected()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, UnsupportedModel):
            return False
        if rounds_activations(self.model):
            return bool((features - expected).float().norm() < MAX_ROUNDING * expected.float().norm())
        dtype = torch.float32 if expected.dtype == torch.float64 else expected.dtype  # norms compute in float32
        return is_close(features.to(dtype), expected.to(dtype))

    def _read(self, reader: SlotReader) -> Tensor:
        for slot, (ids, length) in enumerate(zip(self.texts, self.lengths, strict=True)):
            reader.read([slot], ids[None, :length], None)
            reader.commit(slot, range(length))
        trees = torch.stack([ids[-3:] for ids in self.texts]).flip(0)
        if reader.takes_trees:
            features = reader.read([1, 0], trees, torch.tensor([[-1, 0, 0]] * 2, device=self.device))
        else:
            first_path = reader.read([1, 0], trees[:, :2], None)
            for slot in (0, 1):
                reader.commit(slot, [0])
            features = torch.cat([first_path, reader.read([1, 0], trees[:, 2:], None)], 1)
        return torch.cat([row[[0, node]] for row in features.flip(0) for node in (1, 2)])

    def _compute_expected(self) -> Tensor:
        paths = [
            torch.cat([ids[: length + 1], ids[length + node : length + node + 1]])
            for ids, length in zip(self.texts, self.lengths, strict=True)
            for node in (1, 2)
        ]
        return torch.cat([self._read_path(path) for path in paths])

    def _read_path(self, ids: Tensor) -> Tensor:
        positions = torch.arange(len(ids), device=self.device)[None]
        inputs = {"input_ids": ids[None], "position_ids": positions, "use_cache": False}
        return compute_features(self.model, self.probe, inputs)[0][0, -2:]
