"""A model that writes answers one after the other, with the settings of `generate`."""

from collections.abc import Mapping, Sequence
from typing import Any

from potstill.core.device import resolve_device, resolve_dtype
from potstill.data.prompts import PromptTokenizer
from potstill.decode.answer_stream import AnswerStream
from potstill.decode.drafters.registry import make_speculation
from potstill.decode.engine import Engine
from potstill.decode.generation_config import (
    describe_settings,
    log_unused_settings,
    make_filters,
    read_sampling_defaults,
)
from potstill.decode.quantization import measure_quantization
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling, SamplingFilters
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel, load_model
from potstill.stages.console import print_note
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.text_options import prepare_tokenizer

INT8 = "int8"


class TextGenerator:
    """The model `model` with a decoding loop for one text at a time.

    A temperature of 0 is the argmax. Above 0 the other sampling defaults of the model's generation config act, unless
    `ignore_generation_config`; a note on stderr names them. With dtype int8 a note tells how far the model moves by it
    on the first prompt; auto keeps float32.

    Raises: UsageError for int8 where no code reads it; NotFound, UsageError for a chat template that is no file or no
    template; the errors of `load_model` and `make_speculation`.
    """

    def __init__(self, model: str, options: AnswerOptions) -> None:
        self.name, self.options = model, options
        StageInputs(models=(model,)).check()
        load_options: dict[str, Any] = {
            "allow_pickle": options.allow_pickle,
            "trust_remote_code": options.trust_remote_code,
        }
        self.loaded = load_model(model, device=resolve_device(options.device), **load_options)
        if options.dtype not in ("auto", INT8):
            self.loaded.move_to(self.loaded.model.device, resolve_dtype(options.dtype))
        prepare_tokenizer(self.loaded.tokenizer, options)
        self.prompts = PromptTokenizer(self.loaded.tokenizer, special_in_text=options.special_in_text)
        self.context = get_max_context(self.loaded.model)
        self.sampling = self._make_sampling()
        self.engine = self._make_engine(load_options)
        self._has_described_int8 = options.dtype != INT8

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text as it is. Raises: DataError for control tokens that are refused."""
        return self.prompts.encode_text(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a chat up to its next answer; without a chat template each message is a line.

        Raises: DataError if the template refuses the chat, or for control tokens that are refused.
        """
        return self.prompts.encode(messages)

    def answer(self, prompt: Sequence[int], *, max_tokens: int, seed: int) -> AnswerStream:
        """The answer to a prompt of token ids; together they fit in the context."""
        if not self._has_described_int8:
            self._describe_int8(prompt)
        request = DecodeRequest(prompt=prompt, max_new_tokens=max_tokens, sampling=self.sampling, seed=seed)
        return AnswerStream(self.engine, request)

    def _make_sampling(self) -> Sampling:
        loaded, temperature = self.loaded, self.options.temperature
        filters = SamplingFilters()
        if not self.options.ignore_generation_config:
            filters = choose_filters(loaded, temperature)
        stop = find_stop_tokens(loaded.model, loaded.tokenizer)
        return Sampling(vocabulary=loaded.vocabulary, stop=stop, temperature=temperature, filters=filters)

    def _make_engine(self, load_options: Mapping[str, Any]) -> Engine:
        quantize = self.options.dtype == INT8
        runner = ModelRunner(self.loaded.model, vocabulary=self.loaded.vocabulary, quantize=quantize)
        speculation = make_speculation(runner, self.loaded.tokenizer, self.options.drafts, load_options=load_options)
        return Engine(runner, self.loaded.tokenizer, speculation=speculation, reuse_prefix=True)

    def _describe_int8(self, prompt: Sequence[int]) -> None:
        divergences, _ = measure_quantization(self.loaded.model, prompt, vocabulary=self.loaded.vocabulary)
        print_note(f"int8 is another model: its KL from this one is {float(divergences.mean()):.4f} nats on the prompt")
        self._has_described_int8 = True


def choose_filters(loaded: LoadedModel, temperature: float) -> SamplingFilters:
    """The filters of the model's generation config above temperature 0, named on stderr with what is not used."""
    defaults = read_sampling_defaults(loaded.model)
    log_unused_settings(loaded.model, loaded.name)
    if not defaults:
        return SamplingFilters()
    if temperature == 0:
        print_note(
            f"the answer is greedy; the generation config of {loaded.name} samples with {describe_settings(defaults)}: "
            f"pass --temperature {defaults.get('temperature', 1):g} for that"
        )
        return SamplingFilters()
    defaults.pop("temperature", None)
    filters = make_filters(defaults)
    if filters != SamplingFilters():
        print_note(
            f"sampling uses {describe_settings(defaults)} of the generation config of {loaded.name}; "
            f"--ignore-generation-config drops them"
        )
    return filters
