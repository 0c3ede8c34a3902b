"""Capture: what a teacher says about a text, written down once for any number of students."""

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core import backend
from potstill.core.artefact import (
    TRAINING,
    Card,
    clear,
    hash_file,
    read_card,
    recover,
    replace,
    require_free,
    sync,
    write_text,
    writing_file,
)
from potstill.core.errors import ArtefactError, Interrupted, OutputExists, UnsupportedModel, UsageError
from potstill.core.types import Needs, Signals, supervised
from potstill.data.cache import CLASSES, MANIFEST, PROGRESS, VERSION, Facts, Manifest, Window, counted, key_of, laid
from potstill.data.chat import tokenise
from potstill.data.codes import Format, encode
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.pack import Packs, collate, pack
from potstill.evaluate.perplexity import bos_of
from potstill.evaluate.reading import require_context
from potstill.models.evaluating import evaluating
from potstill.models.load import Loaded, load
from potstill.models.signals import signals
from potstill.models.vocabulary import real_ids
from potstill.ops.cluster import alike
from potstill.ops.coarse import Coarse, coarsened, joined, tail
from potstill.pipeline.stage import as_value, command, disk, parent, require_apart, require_one_process
from potstill.pipeline.texts import columns_of, facts_of, sampled
from potstill.train.run import identify

PACKS = 128  # in a shard
CHUNK = 256  # rows whose logits are alive at once
# What a config says beside the network.
BESIDE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclass(frozen=True, kw_only=True)
class Capture:
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
        for name, least in (("top_k", 1), ("classes", 1), ("sampled", 0), ("context", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
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
        return as_value(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True) -> Manifest:
        """Writes the cache; the folder holds `training/` alone until it is whole.

        Raises: UsageError, NotFound, OutputExists before anything is written; Interrupted, ArtefactError with all whole
            shards left for --resume.
        """
        require_one_process()
        require_apart(out, self.teacher, self.data)
        if resume and overwrite:
            raise UsageError("--resume continues what is in the folder and --overwrite discards it; give one of them")
        recover(out)
        if (_aside(out) / MANIFEST).is_file() and not (out.is_dir() and any(out.iterdir())):
            _take_up(out)  # of a process that was killed before its last move
        require_free(out, overwrite=overwrite or resume)
        if resume and (out / MANIFEST).is_file() and not (out / TRAINING).is_dir():
            return self._finished(out)
        teacher = load(self.teacher, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        require_context(self.context, teacher.model)
        corpus, packs = self._text(teacher.tokenizer)
        device = backend.device(self.device)
        dtype = backend.dtype(self.dtype, on=str(device))
        teacher.model.to(device=device, dtype=dtype)
        facts = Facts(
            **facts_expected(teacher, corpus, packs, dtype), context=self.context, temperature=self.temperature
        )
        identity = identify(VERSION, self.to_dict(), asdict(facts), packs.digest, device.type)
        with disk(out), _workplace(out, overwrite=overwrite, identity=identity, resume=resume) as folder:
            start = time.perf_counter()
            with evaluating(teacher.model), torch.no_grad():
                classes = self._classes(folder, teacher, packs)
                self._shards(folder, identity, teacher, packs, classes, show=show)
            return self._finish(out, folder, teacher, corpus, packs, facts, time.perf_counter() - start)

    def _finished(self, out: Path) -> Manifest:
        """The cache that is there already, if it is this one.

        Raises: OutputExists.
        """
        if read_card(out).get("stage") != self.to_dict():
            raise OutputExists(f"{out} holds another cache that is whole; pass --overwrite to replace it")
        return Manifest.read(out)

    def _text(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Corpus, Packs]:
        """The corpus, and its windows in packs: all of them, or as many as hold `tokens`."""
        corpus = load_corpus(self.data, columns=columns_of(self.columns))
        if self.tokens is None and corpus.digest is None:
            raise UsageError(f"{self.data} is streamed and may never end; say with --tokens how much of it to read")
        rows = tokenise(corpus, tokenizer) if self.tokens is None else sampled(corpus, tokenizer, tokens=self.tokens)
        packs = pack(rows, length=self.context, seed=self.seed, bos=bos_of(tokenizer))
        if self.tokens is None:
            return corpus, packs
        return corpus, packs.head(max(1, int(np.searchsorted(packs.tokens_before, self.tokens))))

    def _classes(self, folder: Path, teacher: Loaded, packs: Packs) -> Tensor:
        """The class of each token, as one-hot rows [V C]; found once, from the first packs, and kept."""
        file, vocabulary = folder / CLASSES, real_ids(teacher.tokenizer)
        if not file.exists():
            said = self._said(teacher, packs, range(min(4, len(packs))))[0]
            found = torch.zeros(vocabulary, dtype=torch.long)
            if said.head is not None and self.classes > 1 and not self.sampled:
                tails = [tail(said.logits(some).float(), self.top_k).sum(0) for some in said.rows.split(CHUNK)]
                weight = torch.stack(tails).sum(0).cpu()
                found = alike(said.head.weight.float().cpu(), weight, self.classes, seed=self.seed)
            with writing_file(file) as aside:
                save_file({"classes": found.numpy().astype(np.uint8)}, aside)
        found = torch.from_numpy(load_file(file)["classes"].astype(np.int64))
        return torch.nn.functional.one_hot(found, self.classes).float()

    def _said(self, teacher: Loaded, packs: Packs, numbers: range) -> tuple[Signals, dict[str, Tensor]]:
        batch = collate([packs[i] for i in numbers])
        batch = {name: values.to(teacher.model.device) for name, values in batch.items()}
        needs = Needs(supervised(batch)[0])
        return signals(teacher.model, batch, needs, vocabulary=real_ids(teacher.tokenizer)), batch

    def _shards(
        self, folder: Path, identity: str, teacher: Loaded, packs: Packs, members: Tensor, *, show: bool
    ) -> None:
        """Every shard that is not there yet, each whole before it counts."""
        done = _progress(folder)["files"]
        members = members.to(teacher.model.device)
        with _bar(show) as bar:
            task = bar.add_task("capturing", total=len(packs), completed=min(len(done) * PACKS, len(packs)), facts="")
            for number in range(len(done), math.ceil(len(packs) / PACKS)):
                name, windows = f"shard-{number:05}.safetensors", []
                for i in range(number * PACKS, min((number + 1) * PACKS, len(packs))):
                    windows += list(self._windows(teacher, packs, i, members))
                    bar.advance(task)
                with writing_file(folder / name) as aside:
                    save_file(laid(windows), aside)
                done[name] = hash_file(folder / name)
                write_text(folder / PROGRESS, json.dumps({"identity": identity, "files": done}))

    def _windows(self, teacher: Loaded, packs: Packs, number: int, members: Tensor) -> Iterator[Window]:
        """What is stored of each window of a pack."""
        said, batch = self._said(teacher, packs, range(number, number + 1))
        generator = torch.Generator(members.device).manual_seed(self.seed * 2**32 + number)
        known = joined([self._kept(said.logits(some), members, generator) for some in said.rows.split(CHUNK)])
        if known.log_p.isnan().any():
            raise UnsupportedModel(f"{teacher.name} gives logits that are no numbers; mend it first")
        known = Coarse(known.ids.cpu(), known.log_p.cpu(), known.log_rest.cpu(), members)
        documents, owners = batch["documents"][0].cpu(), supervised(batch)[2].cpu()
        how = Format(len(members), self.classes, self.exact)
        start = 0
        for document in range(int(documents[-1]) + 1):
            mine, rows = documents == document, int((owners == document).sum())
            ids, labels = (batch[name][0].cpu()[mine].numpy() for name in ("input_ids", "labels"))
            part = known[start : start + rows]
            arrays = encode(part, how)
            if self.hidden and said.head is None:
                raise UnsupportedModel(f"no head explains the hidden states of {teacher.name}; omit --hidden")
            if self.hidden:
                arrays["hidden"] = said.rows[start : start + rows].bfloat16().cpu().view(torch.uint16).numpy()
            yield Window(key_of(ids, labels), rows, int((~part.log_p.isneginf()).sum()), arrays)
            start += rows

    def _kept(self, logits: Tensor, members: Tensor, generator: torch.Generator) -> Coarse:
        logits = logits.float() / self.temperature
        if not self.sampled:
            return coarsened(logits, self.top_k, members, mass=self.mass)
        drawn = torch.multinomial(logits.softmax(-1), self.sampled, replacement=True, generator=generator)
        each = torch.full_like(drawn, 1 / self.sampled, dtype=logits.dtype)
        share = torch.zeros_like(logits).scatter_add_(-1, drawn, each)
        return coarsened(share.log(), int((share > 0).sum(-1).max()), members)

    def _finish(
        self,
        out: Path,
        folder: Path,
        teacher: Loaded,
        corpus: Corpus,
        packs: Packs,
        facts: Facts,
        seconds: float,
    ) -> Manifest:
        files = {**_progress(folder)["files"], CLASSES: hash_file(folder / CLASSES)}
        counts = [counted(folder / name) for name in files if name != CLASSES]
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
            parents=[parent("teacher", teacher)],
            data=facts_of(corpus, packs),
            cost={"tokens": packs.tokens, "seconds": seconds},
            details=details,
            command=command(),
        )
        card.write(folder)
        write_text(folder / MANIFEST, json.dumps(manifest.to_dict(), indent=1))
        sync(folder)
        shutil.rmtree(_aside(out), ignore_errors=True)
        folder.rename(_aside(out))
        _take_up(out)
        return manifest


def facts_expected(teacher: Loaded, corpus: Corpus, packs: Packs, dtype: torch.dtype) -> dict[str, Any]:
    """The facts of a cache that follow from teacher and text."""
    return {
        **teacher_facts(teacher),
        "dtype": backend.name_of(dtype),
        **tokenizer_facts(teacher.tokenizer),
        "text": corpus.digest or packs.digest,
        "vocabulary": real_ids(teacher.tokenizer),
    }


def teacher_facts(teacher: Loaded) -> dict[str, str]:
    """The digests of a teacher's weights, and of its config as far as it says anything of the network."""
    config = {name: value for name, value in teacher.model.config.to_diff_dict().items() if name not in BESIDE}
    said = json.dumps(config, sort_keys=True, default=str)
    return {"teacher": teacher.digest, "config": hashlib.sha256(said.encode()).hexdigest()}


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The digests of a tokenizer, the tokens that it puts around a document included, and of its chat template."""
    table = f"{tokenizer.backend_tokenizer.to_str()} {tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    return {
        "tokenizer": hashlib.sha256(table.encode()).hexdigest(),
        "template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
    }


@contextlib.contextmanager
def _workplace(out: Path, *, overwrite: bool, identity: str, resume: bool) -> Iterator[Path]:
    """`out`/training; what is whole in it stays if the capture does not end."""
    folder = out / TRAINING
    if overwrite or not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    if not (folder / PROGRESS).exists():
        write_text(folder / PROGRESS, json.dumps({"identity": identity, "files": {}}))
    found = _progress(folder)
    if found["identity"] != identity:
        raise ArtefactError(f"{out} holds a capture with other settings, teacher or text; start again with --overwrite")
    for name, digest in list(found["files"].items()):
        if not (folder / name).is_file() or hash_file(folder / name) != digest:
            later = [other for other in found["files"] if other >= name]
            found["files"] = {k: v for k, v in found["files"].items() if k not in later}
            write_text(folder / PROGRESS, json.dumps(found))
            break
    try:
        yield folder
    except KeyboardInterrupt:
        if not _progress(folder)["files"]:
            raise
        raise Interrupted(f"stopped; the shards that are whole are kept in {out}, and --resume continues") from None
    finally:
        if folder.exists() and not _progress(folder)["files"]:
            shutil.rmtree(folder)


def _aside(out: Path) -> Path:
    return out.resolve().with_name(f".{out.resolve().name}.capture")


def _take_up(out: Path) -> None:
    """Put a capture that is whole, and was only not moved yet, in its place."""
    if (_aside(out) / MANIFEST).is_file():
        (_aside(out) / PROGRESS).unlink(missing_ok=True)
        replace(_aside(out), out)


def _progress(folder: Path) -> dict[str, Any]:
    """The identity of the capture and its whole shards.

    Raises: ArtefactError.
    """
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return {"identity": str(found["identity"]), "files": dict(found["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / PROGRESS} cannot be read ({error}); start again with --overwrite") from error


def _bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
