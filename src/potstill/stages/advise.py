"""Advises whether speculative decoding pays for a model on this machine, with which draft, and how long it should be.

The prompts are the user's own, since acceptance depends on the text. Acceptance and times are measured once for each
draft. They predict the speed-up of every length, and `check` measures the speed-ups, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from potstill.core.atomic_files import atomic_folder
from potstill.core.device import get_dtype_name, resolve_device, resolve_dtype
from potstill.core.errors import UsageError
from potstill.data.corpus import Corpus
from potstill.decode.drafters.registry import find_drafter, parse_tree
from potstill.decode.request import DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.evaluate.speculation.candidates import Setting, make_candidates
from potstill.evaluate.speculation.prediction import collect_evidence
from potstill.evaluate.speculation.prompts import build_prompts
from potstill.evaluate.speculation.timing import measure_speeds
from potstill.models.eval_mode import eval_mode
from potstill.models.inference import get_max_context
from potstill.models.load import LoadedModel, load_model
from potstill.stages.advice import (
    Trial,
    add_measurement,
    describe_evidence,
    list_differences,
    make_advice,
    summarize_errors,
    write_advice,
)
from potstill.stages.console import explain_write_errors, print_note
from potstill.stages.corpus import load_data
from potstill.stages.option_checks import check_single_process
from potstill.stages.options import AdviseOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import reserve_output
from potstill.stages.stage import to_plain_dict
from potstill.stages.text_generator import INT8
from potstill.stages.text_options import prepare_tokenizer


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(AdviseOptions):
    """Tries each `draft` for `model` with every length in `draft_length`, and with each `tree`.

    The first `prompts` of `data` are answered, one at a time, with at most `max_tokens` tokens. Without `check` the
    speed-ups are predicted alone.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "advice"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in (("prompts", 1), ("max_tokens", 2), ("runs", 1), ("seed", 0)):
            if getattr(self, name) < minimum:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {getattr(self, name)}; it must be at least {minimum}")
        if not self.temperature >= 0:
            raise UsageError(f"--temperature is {self.temperature}; it must be at least 0 (0 is greedy)")
        for name, values in (("draft", self.draft), ("tree", self.tree)):
            if duplicates := [value for value in values if values.count(value) > 1]:
                raise UsageError(f"--{name} {duplicates[0]} is given twice; give it once")
        if not self.draft:
            raise UsageError("no draft is given; give --draft, such as lookup")
        assert self.list_settings(), "every draft has a length"

    def list_settings(self) -> list[Setting]:
        """Each draft with each length, then with each tree.

        Raises: UsageError for a draft, a length or a tree that cannot be read.
        """
        for draft in self.draft:
            find_drafter(draft)
        for tree in self.tree:
            parse_tree(tree)
        lengths = parse_lengths(self.draft_length)
        chains = [Setting(draft, length=length) for draft in self.draft for length in lengths]
        return chains + [Setting(draft, tree=tree) for tree in self.tree for draft in self.draft]

    def to_dict(self) -> dict[str, Any]:
        """The options of the stage as plain data."""
        return to_plain_dict(self)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        drafts = (find_drafter(draft) for draft in self.draft)
        models = [argument for spec, argument in drafts if spec.name in ("model", "translated")]
        return StageInputs(models=(self.model, *models), data=(self.data,))

    def run(self, out: Path | None = None, *, overwrite: bool = False) -> dict[str, Any]:
        """The settings with their speed-ups, what they follow from, and the advice; also written to `out` if given.

        Raises: UsageError, NotFound, OutputExists before a model is opened; DataError for data without prompts; the
            errors of `make_speculation`.
        """
        check_single_process()
        if out is None:
            self.inputs.check()
            return self._advise()
        with reserve_output(out, self.inputs, overwrite=overwrite):
            result = {"out": str(out), **self._advise()}
            with explain_write_errors(out), atomic_folder(out, overwrite=overwrite) as folder:
                write_advice(result, folder)
        return result

    def _advise(self) -> dict[str, Any]:
        loaded, corpus = self._load_model(), self._load_corpus()
        context = get_max_context(loaded.model)
        if self.max_tokens >= context:
            raise UsageError(f"--max-tokens is {self.max_tokens}, and {self.model} has {context} tokens of context")
        prompts = build_prompts(
            corpus,
            loaded.tokenizer,
            limit=self.prompts,
            max_tokens=context - self.max_tokens,
            special_in_text=self.special_in_text,
            on_bad_row=self.on_bad_row,
        )
        with eval_mode(loaded.model):
            findings = self._try_settings(loaded, prompts)
        return {
            "model": self.model,
            "data": {"name": corpus.name, "kind": corpus.kind, "prompts": len(prompts)},
            "conditions": {
                "device": str(loaded.model.device),
                "threads": torch.get_num_threads(),
                "dtype": self.dtype if self.dtype == INT8 else get_dtype_name(loaded.model.dtype),
                "temperature": self.temperature,
            },
            **findings,
            "stage": self.to_dict(),
        }

    def _try_settings(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        runner = ModelRunner(loaded.model, vocabulary=loaded.vocabulary, quantize=self.dtype == INT8)
        candidates, refusals = make_candidates(
            runner,
            loaded.tokenizer,
            self.draft,
            lengths=parse_lengths(self.draft_length),
            trees=self.tree,
            load_options=self._load_options,
        )
        for refusal in refusals:
            print_note(refusal)
        requests = self._make_requests(loaded, prompts)
        evidence = collect_evidence(runner, requests, candidates)
        trials = [
            Trial(
                setting=setting,
                prediction=each.predict(setting, max_new_tokens=self.max_tokens),
                is_smaller=each.candidate.is_smaller,
            )
            for each in evidence
            for setting in each.candidate.settings
        ]
        findings: dict[str, Any] = {}
        if self.check:
            speculations = [each.candidate.make_speculation(s) for each in evidence for s in each.candidate.settings]
            plain, speeds = measure_speeds(runner, requests, speculations, runs=self.runs)
            trials = [add_measurement(trial, speed, plain) for trial, speed in zip(trials, speeds, strict=True)]
            findings = {"tokens_per_second": plain.tokens_per_second, "error": summarize_errors(trials)}
            if self.temperature == 0:
                findings["differences"] = list_differences(trials, speeds, plain)
        return {
            **describe_evidence(evidence, max_new_tokens=self.max_tokens),
            **findings,
            "settings": [trial.to_dict() for trial in trials],
            "advice": make_advice(trials).to_dict(),
        }

    def _make_requests(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> list[DecodeRequest]:
        stop_tokens = find_stop_tokens(loaded.model, loaded.tokenizer)
        sampling = Sampling(vocabulary=loaded.vocabulary, stop=stop_tokens, temperature=self.temperature)
        return [
            DecodeRequest(prompt=prompt, max_new_tokens=self.max_tokens, sampling=sampling, seed=self.seed + number)
            for number, prompt in enumerate(prompts)
        ]

    @property
    def _load_options(self) -> dict[str, Any]:
        return {"allow_pickle": self.allow_pickle, "trust_remote_code": self.trust_remote_code}

    def _load_model(self) -> LoadedModel:
        device = resolve_device(self.device)
        dtype = torch.float32 if self.dtype == INT8 else resolve_dtype(self.dtype, device_type=str(device))
        loaded = load_model(self.model, device=device, dtype=dtype, **self._load_options)
        prepare_tokenizer(loaded.tokenizer, self)
        return loaded

    def _load_corpus(self) -> Corpus:
        return load_data(self, split="all")


def parse_lengths(text: str) -> tuple[int, ...]:
    """The numbers of `--draft-length`, ascending.

    Raises: UsageError for anything else.
    """
    pieces = [piece.strip() for piece in str(text).split(",")]
    if not all(piece.isdecimal() and int(piece) >= 1 for piece in pieces):
        raise UsageError(f"--draft-length is {text!r}; give numbers of at least 1, such as 1,2,4,8")
    return tuple(sorted({int(piece) for piece in pieces}))
