"""Export: writes a model in the format of another runtime, compares its tokens, and prints the commands that run it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.atomic_files import atomic_file, atomic_folder
from potstill.core.card import Card
from potstill.core.elastic import name_size
from potstill.core.errors import ArtifactError, NotFound, OutputExists, UsageError
from potstill.models.families.registry import has_experts
from potstill.models.gguf_export.tensors import FILE_TYPES
from potstill.models.load import LoadedModel, load_model
from potstill.stages.console import explain_write_errors, get_command
from potstill.stages.export.card import FORMATS, write_export_card
from potstill.stages.export.commands import (
    format_model_file,
    get_draft_file_name,
    get_file_name,
    list_file_commands,
    list_folder_commands,
)
from potstill.stages.export.gguf_format import export_gguf
from potstill.stages.export.graph_format import GRAPH_PACKAGES, export_graphs, format_snippet
from potstill.stages.export.hf_format import export_hf
from potstill.stages.export.options import ExportOptions
from potstill.stages.export.shared import check_draft, check_plain_weights, get_name, list_stop_strings
from potstill.stages.option_checks import check_choice, check_output_not_input, check_save_dtype, check_single_process
from potstill.stages.preflight import StageInputs
from potstill.stages.run_folder import reserve_output
from potstill.stages.stage import make_parent, to_plain_dict

DRAFT_FOLDER, MODEL_FILE, GGUF_SUFFIX = "draft", "Modelfile", ".gguf"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions):
    """Writes `model` as a stock folder, a GGUF file, or graphs of ONNX or OpenVINO.

    The output appears only if every check passes. What is checked: the logits after a reload (hf), or 100 greedy tokens
    of the runtime where it is installed (gguf, onnx, openvino).
    """

    kind: ClassVar[str] = "export"

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "model", name_size(self.model, self.size))
            object.__setattr__(self, "size", None)
        check_choice("to", self.to, tuple(FORMATS))
        check_choice("type", self.type, tuple(FILE_TYPES))
        check_save_dtype(self.save_dtype)
        if self.draft and self.to not in ("hf", "gguf"):
            raise UsageError(
                f"--draft is for vLLM and llama.cpp, and --to {self.to} makes neither's files; leave it out"
            )

    @property
    def inputs(self) -> StageInputs:
        """The models and packages that the stage needs."""
        return StageInputs(models=(self.model, self.draft), packages=GRAPH_PACKAGES.get(self.to, ()))

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)

    def run(self, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Write and check; the facts of the files, the checks, and the commands by their runtimes.

        Raises: UsageError, NotFound, OutputExists, MissingDependency before a model is opened; UnsupportedModel for a
            model that the format cannot express; VocabularyMismatch for a draft with another tokenizer; ArtifactError
            if a check fails.
        """
        check_single_process()
        if out.suffix.lower() == GGUF_SUFFIX:
            return self._write_file(out, overwrite=overwrite)
        with reserve_output(out, self.inputs, overwrite=overwrite):
            loaded, draft = self._load(self.model), self._load_draft()
            with explain_write_errors(out), atomic_folder(out, overwrite=overwrite) as folder:
                result = self._write_folder(loaded, draft, folder, name=get_name(out))
        commands = self._list_commands(str(out), get_name(out), has_draft=draft is not None, facts=result)
        return {"out": str(out), "format": self.to, **result, "commands": commands}

    def _write_file(self, out: Path, *, overwrite: bool) -> dict[str, Any]:
        if self.to != "gguf" or self.draft:
            what = f"--to {self.to} writes a folder" if self.to != "gguf" else "a model and its draft are two files"
            raise UsageError(f"{what}, and --out {out} is one file; give a folder")
        self.inputs.check()
        check_output_file(out, overwrite=overwrite)
        check_output_not_input(out, self.model)
        loaded = self._load(self.model)
        with explain_write_errors(out), atomic_file(out) as file:
            result = export_gguf(loaded, file, file_type=self.type, check=self.check)
        return {
            "out": str(out),
            "format": self.to,
            **result["facts"],
            "checks": result["checks"],
            "commands": list_file_commands(str(out), name=get_name(out)),
        }

    def _write_folder(
        self, loaded: LoadedModel, draft: LoadedModel | None, folder: Path, *, name: str
    ) -> dict[str, Any]:
        """The files of the model and its draft with a card; the facts of the model's, and its checks."""
        if draft is not None:
            check_draft(draft, loaded)
            self._write_model(draft, folder, name=name, is_draft=True)
        result = self._write_model(loaded, folder, name=name)
        if self.to == "gguf":
            text = format_model_file(get_file_name(name, self.type), list_stop_strings(loaded))
            (folder / MODEL_FILE).write_text(text, encoding="utf-8")
        parents = [make_parent("exported from", loaded), *([make_parent("draft", draft)] if draft else [])]
        card = Card(
            stage=self.to_dict(),
            seed=0,
            parents=parents,
            details=result["facts"],
            invariants=result["checks"],
            command=get_command(),
        )
        target, facts = "." if self.to == "gguf" else name, result["facts"]
        commands = self._list_commands(target, name, has_draft=draft is not None, facts=facts)
        write_export_card(folder, card, title=name, commands=commands, snippet=format_snippet(self.to, name))
        return {**facts, "checks": result["checks"]}

    def _write_model(self, loaded: LoadedModel, folder: Path, *, name: str, is_draft: bool = False) -> dict[str, Any]:
        if self.to == "gguf":
            file_name = get_draft_file_name(self.type) if is_draft else get_file_name(name, self.type)
            return export_gguf(loaded, folder / file_name, file_type=self.type, check=self.check)
        if self.to == "hf":
            target = folder / DRAFT_FOLDER if is_draft else folder
            return export_hf(loaded, target, save_dtype=self.save_dtype, trust_remote_code=self.trust_remote_code)
        return export_graphs(loaded, folder, runtime=self.to, check=self.check)

    def _list_commands(self, folder: str, name: str, *, has_draft: bool, facts: Mapping[str, Any]) -> dict[str, str]:
        """The commands for files in `folder`, which is empty where the command runs inside it."""
        if self.to == "hf":
            draft, has_gguf = f"{folder}/{DRAFT_FOLDER}" if has_draft else "", not has_experts(facts["architecture"])
            return list_folder_commands(folder, name=name, draft=draft, has_gguf=has_gguf)
        if self.to != "gguf":
            return {}
        prefix = "" if folder == "." else f"{folder}/"
        return list_file_commands(
            f"{prefix}{get_file_name(name, self.type)}",
            name=name,
            model_file=f"{prefix}{MODEL_FILE}",
            draft_file=f"{prefix}{get_draft_file_name(self.type)}" if has_draft else "",
        )

    def _load(self, name: str) -> LoadedModel:
        check_plain_weights(name, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        return load_model(name, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)

    def _load_draft(self) -> LoadedModel | None:
        return self._load(self.draft) if self.draft else None


def check_output_file(out: Path, *, overwrite: bool) -> None:
    """Refuse a file that exists, or that cannot be written.

    Raises: OutputExists, NotFound, ArtifactError.
    """
    if out.is_dir():
        raise OutputExists(f"{out} is a folder with the name of a file; choose another --out")
    if out.exists() and not overwrite:
        raise OutputExists(f"{out} exists; choose another --out, or pass --overwrite to replace it")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder} to write {out.name} in; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArtifactError(f"no permission to write in {folder}; choose another --out")
