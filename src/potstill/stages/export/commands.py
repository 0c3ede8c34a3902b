"""The commands that serve a model with vLLM, llama.cpp and Ollama, with its draft if it has one."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence

DRAFT_LENGTH = 4  # tokens that a draft proposes at once


def list_folder_commands(folder: str, *, name: str, draft: str = "", has_gguf: bool = True) -> dict[str, str]:
    """The commands for a stock folder: vLLM at once, llama.cpp and Ollama through a GGUF file, if it has that form."""
    vllm = {"vLLM": format_vllm_command(folder, name=name, draft=draft)}
    if not has_gguf:
        return vllm
    gguf = f"{name}-gguf"
    export = ["potstill", "export", folder, "--to", "gguf", "--type", "q8_0"]
    if draft:
        export += ["--draft", draft]
    file, draft_file = f"{gguf}/{get_file_name(name, 'q8_0')}", f"{gguf}/{get_draft_file_name('q8_0')}"
    return {
        **vllm,
        "GGUF": shlex.join([*export, "--out", gguf]),
        **list_file_commands(file, name=name, model_file=f"{gguf}/Modelfile", draft_file=draft_file if draft else ""),
    }


def list_file_commands(file: str, *, name: str, model_file: str = "", draft_file: str = "") -> dict[str, str]:
    """The commands for a GGUF file; Ollama needs the `model_file` beside it, and has no drafts."""
    server = ["llama-server", "-m", file]
    if draft_file:
        server += ["-md", draft_file, "--spec-type", "draft-simple", "--spec-draft-n-max", str(DRAFT_LENGTH)]
    commands = {"llama.cpp": shlex.join(server)}
    if model_file:
        create = shlex.join(["ollama", "create", name, "-f", model_file])
        commands["Ollama"] = f"{create} && {shlex.join(['ollama', 'run', name])}"
    return commands


def format_vllm_command(folder: str, *, name: str, draft: str = "") -> str:
    """`vllm serve` of a stock folder; a draft needs the same tokenizer."""
    command = ["vllm", "serve", folder, "--served-model-name", name]
    if draft:
        config = {"method": "draft_model", "model": draft, "num_speculative_tokens": DRAFT_LENGTH}
        command += ["--speculative-config", json.dumps(config)]
    return shlex.join(command)


def get_file_name(name: str, file_type: str) -> str:
    """The name of a model's GGUF file in a folder."""
    return f"{name}-{file_type}.gguf"


def get_draft_file_name(file_type: str) -> str:
    """The name of its draft's GGUF file."""
    return f"draft-{file_type}.gguf"


def format_model_file(file: str, stop_strings: Sequence[str]) -> str:
    """Ollama's Modelfile: the file beside it, and the texts that end an answer."""
    stops = [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stop_strings]
    return "\n".join([f"FROM ./{file}", *stops]) + "\n"


def format_commands(commands: Mapping[str, str]) -> str:
    """The commands as a block of a shell, each under its runtime's name."""
    lines: Iterable[str] = (f"# {runtime}\n{command}" for runtime, command in commands.items())
    return "```bash\n" + "\n".join(lines) + "\n```"
