"""Capture: what a teacher says about a text, written down once for any number of students."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.atomic_files import (
    TRAINING_FOLDER,
    atomic_file,
    check_output_free,
    hash_file,
    recover_folder,
    replace_folder,
    sync_folder,
    write_text,
)
from potstill.core.card import Card, read_card
from potstill.core.device import get_dtype_name, resolve_device, resolve_dtype
from potstill.core.errors import ArtifactError, OutputExists, UnsupportedModel, UsageError
from potstill.core.types import Needs, Signals, supervised_positions
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.packing import Packs, collate, pack
from potstill.data.tokenize import tokenize_corpus
from potstill.evaluate.perplexity import get_bos_id
from potstill.evaluate.scoring_windows import check_context
from potstill.models.eval_mode import eval_mode
from potstill.models.fingerprint import fingerprint_teacher, fingerprint_tokenizer
from potstill.models.load import LoadedModel, load_model
from potstill.models.signals import compute_signals
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.ops.coarse import CoarseDistribution, coarsen, concatenate, tail_probabilities
from potstill.ops.kmeans import kmeans
from potstill.stages.console import explain_write_errors, get_command
from potstill.stages.dataset import build_corpus_facts, parse_columns, tokenize_sample
from potstill.stages.option_checks import check_output_not_input, check_single_process
from potstill.stages.run_folder import explain_interrupt, training_folder
from potstill.stages.stage import make_parent, to_plain_dict
from potstill.teachers.cache_codec import CodecFormat, encode
from potstill.teachers.cached import (
    CLASSES,
    MANIFEST,
    PROGRESS,
    VERSION,
    CachedWindow,
    CacheFacts,
    Manifest,
    build_shard,
    count_shard,
    hash_window,
)
from potstill.train.run import compute_run_id

PACKS_PER_SHARD = 128  # in a shard
ROWS_PER_CHUNK = 256  # rows whose logits are alive at once


@dataclass(frozen=True, kw_only=True)
class CacheTeacherConfig:
    """`teacher` on `data` in windows of `context` tokens, all of it or the first `tokens`.

    Of each row the `top_k` likeliest tokens are kept, no more than hold `mass`, with the exact mass of the others,
    split into `classes` of tokens that are alike. With `sampled` so many tokens are drawn instead, whose shares give
    an unbiased gradient of the forward KL. `exact` keeps float32 logarithms, `hidden` the last hidden states too.

    Source: random sampling, Anshumann et al. (arXiv:2503.16870); the classes are ours.
    """

    kind: ClassVar[str] = "capture"
    teacher: str
    data: str = "stdlib"
    columns: str = ""
    tokens: int | None = None
    context: int = 512
    top_k: int = 64
    mass: float = 1.0
    classes: int = 16
    sampled: int = 0
    exact: bool = False
    hidden: bool = False
    temperature: float = 1.0
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("top_k", 1), ("classes", 1), ("sampled", 0), ("context", 2), ("seed", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {minimum}")
        if self.classes > 255:
            raise UsageError(f"--classes is {self.classes}; there are at most 255")
        if not 0 < self.mass <= 1:
            raise UsageError(f"--mass is {self.mass}; it is a share of the probability, above 0 and at most 1")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--temperature is {self.temperature}; it must be positive")
        if self.sampled and self.mass < 1:
            raise UsageError("--mass cuts the likeliest tokens, and with --sampled none are kept; give one of them")

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True) -> Manifest:
        """Writes the cache; the folder holds `training/` alone until it is whole.

        Raises: UsageError, NotFound, OutputExists before anything is written; Interrupted, ArtefactError with all whole
            shards left for --resume.
        """
        check_single_process()
        check_output_not_input(out, self.teacher, self.data)
        if resume and overwrite:
            raise UsageError("--resume continues what is in the folder and --overwrite discards it; give one of them")
        recover_folder(out)
        if (_staging_path(out) / MANIFEST).is_file() and not (out.is_dir() and any(out.iterdir())):
            _move_into_place(out)  # of a process that was killed before its last move
        check_output_free(out, overwrite=overwrite or resume)
        if resume and (out / MANIFEST).is_file() and not (out / TRAINING_FOLDER).is_dir():
            return self._read_finished_manifest(out)
        teacher = load_model(self.teacher, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        check_context(self.context, teacher.model)
        corpus, packs = self._load_packs(teacher.tokenizer)
        device = resolve_device(self.device)
        dtype = resolve_dtype(self.dtype, device_type=str(device))
        teacher.model.to(device=device, dtype=dtype)
        facts = CacheFacts(
            **compute_expected_facts(teacher, corpus, packs, dtype), context=self.context, temperature=self.temperature
        )
        identity = compute_run_id(VERSION, self.to_dict(), asdict(facts), packs.digest, device.type)
        with (
            explain_write_errors(out),
            explain_interrupt(out, saved="every finished shard", is_resumable=has_finished_shard),
            training_folder(
                out,
                overwrite=overwrite or not resume,
                marker=(PROGRESS, json.dumps({"identity": identity, "files": {}})),
                is_resumable=has_finished_shard,
            ) as folder,
        ):
            check_progress(out, folder, identity)
            start = time.perf_counter()
            with eval_mode(teacher.model), torch.no_grad():
                classes = self._load_token_classes(folder, teacher, packs)
                self._write_shards(folder, identity, teacher, packs, classes, show=show)
            return self._publish(out, folder, teacher, corpus, packs, facts, time.perf_counter() - start)

    def _read_finished_manifest(self, out: Path) -> Manifest:
        """The cache that is there already, if it is this one.

        Raises: OutputExists.
        """
        if read_card(out).get("stage") != self.to_dict():
            raise OutputExists(f"{out} holds another cache that is whole; pass --overwrite to replace it")
        return Manifest.from_folder(out)

    def _load_packs(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Corpus, Packs]:
        """The corpus, and its windows in packs: all of them, or as many as hold `tokens`."""
        corpus = load_corpus(self.data, columns=parse_columns(self.columns))
        if self.tokens is None and corpus.digest is None:
            raise UsageError(f"{self.data} is streamed and may never end; say with --tokens how much of it to read")
        rows = (
            tokenize_corpus(corpus, tokenizer)
            if self.tokens is None
            else tokenize_sample(corpus, tokenizer, tokens=self.tokens)
        )
        packs = pack(rows, length=self.context, seed=self.seed, bos=get_bos_id(tokenizer))
        if self.tokens is None:
            return corpus, packs
        return corpus, packs.take(max(1, int(np.searchsorted(packs.token_offsets, self.tokens))))

    def _load_token_classes(self, folder: Path, teacher: LoadedModel, packs: Packs) -> Tensor:
        """The class of each token, as one-hot rows [V C]; found once, from the first packs, and kept."""
        file, vocabulary = folder / CLASSES, count_token_ids(teacher.tokenizer)
        if not file.exists():
            teacher_signals = self._compute_signals(teacher, packs, range(min(4, len(packs))))[0]
            token_classes = torch.zeros(vocabulary, dtype=torch.long)
            if teacher_signals.head is not None and self.classes > 1 and not self.sampled:
                tails = [
                    tail_probabilities(teacher_signals.logits(chunk).float(), self.top_k).sum(0)
                    for chunk in teacher_signals.rows.split(ROWS_PER_CHUNK)
                ]
                weight = torch.stack(tails).sum(0).cpu()
                token_classes = kmeans(teacher_signals.head.weight.float().cpu(), weight, self.classes, seed=self.seed)
            with atomic_file(file) as staging_file:
                save_file({"classes": token_classes.numpy().astype(np.uint8)}, staging_file)
        token_classes = torch.from_numpy(load_file(file)["classes"].astype(np.int64))
        return torch.nn.functional.one_hot(token_classes, self.classes).float()

    def _compute_signals(
        self, teacher: LoadedModel, packs: Packs, pack_numbers: range
    ) -> tuple[Signals, dict[str, Tensor]]:
        batch = collate([packs[i] for i in pack_numbers])
        batch = {name: values.to(teacher.model.device) for name, values in batch.items()}
        needs = Needs(supervised_positions(batch)[0])
        return compute_signals(teacher.model, batch, needs, vocabulary=count_token_ids(teacher.tokenizer)), batch

    def _write_shards(
        self, folder: Path, identity: str, teacher: LoadedModel, packs: Packs, members: Tensor, *, show: bool
    ) -> None:
        """Every shard that is not there yet, each whole before it counts."""
        shard_digests = _read_progress(folder)["files"]
        members = members.to(teacher.model.device)
        with _make_progress_bar(show) as bar:
            task = bar.add_task(
                "capturing", total=len(packs), completed=min(len(shard_digests) * PACKS_PER_SHARD, len(packs)), facts=""
            )
            for number in range(len(shard_digests), math.ceil(len(packs) / PACKS_PER_SHARD)):
                name, windows = f"shard-{number:05}.safetensors", []
                for i in range(number * PACKS_PER_SHARD, min((number + 1) * PACKS_PER_SHARD, len(packs))):
                    windows += list(self._encode_windows(teacher, packs, i, members))
                    bar.advance(task)
                with atomic_file(folder / name) as staging_file:
                    save_file(build_shard(windows), staging_file)
                shard_digests[name] = hash_file(folder / name)
                write_text(folder / PROGRESS, json.dumps({"identity": identity, "files": shard_digests}))

    def _encode_windows(
        self, teacher: LoadedModel, packs: Packs, number: int, members: Tensor
    ) -> Iterator[CachedWindow]:
        """What is stored of each window of a pack."""
        teacher_signals, batch = self._compute_signals(teacher, packs, range(number, number + 1))
        generator = torch.Generator(members.device).manual_seed(self.seed * 2**32 + number)
        distributions = concatenate(
            [
                self._compress_logits(teacher_signals.logits(chunk), members, generator)
                for chunk in teacher_signals.rows.split(ROWS_PER_CHUNK)
            ]
        )
        if distributions.log_p.isnan().any():
            raise UnsupportedModel(f"{teacher.name} gives logits that are no numbers; mend it first")
        distributions = CoarseDistribution(
            distributions.ids.cpu(), distributions.log_p.cpu(), distributions.log_rest.cpu(), members
        )
        documents, owners = batch["documents"][0].cpu(), supervised_positions(batch)[2].cpu()
        encoding = CodecFormat(len(members), self.classes, self.exact)
        start = 0
        for document in range(int(documents[-1]) + 1):
            mask, num_rows = documents == document, int((owners == document).sum())
            ids, labels = (batch[name][0].cpu()[mask].numpy() for name in ("input_ids", "labels"))
            part = distributions[start : start + num_rows]
            arrays = encode(part, encoding)
            if self.hidden and teacher_signals.head is None:
                raise UnsupportedModel(f"no head explains the hidden states of {teacher.name}; omit --hidden")
            if self.hidden:
                arrays["hidden"] = (
                    teacher_signals.rows[start : start + num_rows].bfloat16().cpu().view(torch.uint16).numpy()
                )
            yield CachedWindow(hash_window(ids, labels), num_rows, int((~part.log_p.isneginf()).sum()), arrays)
            start += num_rows

    def _compress_logits(self, logits: Tensor, members: Tensor, generator: torch.Generator) -> CoarseDistribution:
        logits = logits.float() / self.temperature
        if not self.sampled:
            return coarsen(logits, self.top_k, members, mass=self.mass)
        samples = torch.multinomial(logits.softmax(-1), self.sampled, replacement=True, generator=generator)
        weight = torch.full_like(samples, 1 / self.sampled, dtype=logits.dtype)
        frequencies = torch.zeros_like(logits).scatter_add_(-1, samples, weight)
        return coarsen(frequencies.log(), int((frequencies > 0).sum(-1).max()), members)

    def _publish(
        self,
        out: Path,
        folder: Path,
        teacher: LoadedModel,
        corpus: Corpus,
        packs: Packs,
        facts: CacheFacts,
        seconds: float,
    ) -> Manifest:
        files = {**_read_progress(folder)["files"], CLASSES: hash_file(folder / CLASSES)}
        counts = [count_shard(folder / name) for name in files if name != CLASSES]
        rows, windows, ids = (sum(column) for column in zip(*counts, strict=True))
        manifest = Manifest(
            facts=facts,
            names={"teacher": teacher.name, "text": corpus.name, "columns": self.columns},
            kept="sampled" if self.sampled else "top-k",
            top_k=self.sampled or self.top_k,
            mass=self.mass,
            classes=self.classes,
            exact=self.exact,
            hidden=self.hidden,
            rows=rows,
            windows=windows,
            ids=ids,
            bytes=sum((folder / name).stat().st_size for name in files),
            seed=self.seed,
            files=files,
        )
        details = {"bytes_per_row": manifest.bytes / rows, "tokens_per_row": ids / rows}
        card = Card(
            stage=self.to_dict(),
            seed=self.seed,
            parents=[make_parent("teacher", teacher)],
            data=build_corpus_facts(corpus, packs),
            cost={"tokens": packs.num_tokens, "seconds": seconds},
            details=details,
            command=get_command(),
        )
        card.write(folder)
        write_text(folder / MANIFEST, json.dumps(manifest.to_dict(), indent=1))
        sync_folder(folder)
        shutil.rmtree(_staging_path(out), ignore_errors=True)
        folder.rename(_staging_path(out))
        _move_into_place(out)
        return manifest


def compute_expected_facts(teacher: LoadedModel, corpus: Corpus, packs: Packs, dtype: torch.dtype) -> dict[str, Any]:
    """The facts of a cache that follow from teacher and text."""
    return {
        **fingerprint_teacher(teacher),
        "dtype": get_dtype_name(dtype),
        **fingerprint_tokenizer(teacher.tokenizer),
        "text": corpus.digest or packs.digest,
        "vocabulary": count_token_ids(teacher.tokenizer),
    }


def has_finished_shard(folder: Path) -> bool:
    """Whether a training folder holds a finished shard."""
    return (folder / PROGRESS).is_file() and bool(_read_progress(folder)["files"])


def check_progress(out: Path, folder: Path, identity: str) -> None:
    """Refuses to continue another cache, and drops shards from the first missing or altered one on.

    Raises: ArtifactError.
    """
    progress = _read_progress(folder)
    if progress["identity"] != identity:
        raise ArtifactError(f"{out} holds a cache of other settings, teacher or text; start again with --overwrite")
    valid_files = dict(
        takewhile(
            lambda item: (folder / item[0]).is_file() and hash_file(folder / item[0]) == item[1],
            sorted(progress["files"].items()),
        )
    )
    if valid_files != progress["files"]:
        write_text(folder / PROGRESS, json.dumps({**progress, "files": valid_files}))


def _staging_path(out: Path) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.capture")


def _move_into_place(out: Path) -> None:
    """Put a capture that is whole, and was only not moved yet, in its place."""
    if (_staging_path(out) / MANIFEST).is_file():
        (_staging_path(out) / PROGRESS).unlink(missing_ok=True)
        replace_folder(_staging_path(out), out)


def _read_progress(folder: Path) -> dict[str, Any]:
    """The identity of the capture and its whole shards.

    Raises: ArtefactError.
    """
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return {"identity": str(progress["identity"]), "files": dict(progress["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / PROGRESS} cannot be read ({error}); start again with --overwrite") from error


def _make_progress_bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
