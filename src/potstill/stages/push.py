"""Uploads a finished model folder to the hub, or says what it would upload."""

import json
import re
from pathlib import Path
from typing import Any

from potstill.core.atomic_files import CARD_FILE, EDITS_FILE, TRAINING_FOLDER
from potstill.core.card import MISSING_MEASURES, read_card
from potstill.core.errors import ArtifactError, NotFound, ServerError, UnsupportedModel, UsageError
from potstill.models.lineage import read_front_matter
from potstill.models.weight_files import count_bytes_on_disk
from potstill.stages.public_names import hide_folders_in

README_FILE, CONFIG_FILE = "README.md", "config.json"
REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
SNIPPET_NAME = re.compile(r'(from_pretrained\()"[^"]*"')


def push(folder: Path, repo: str, *, private: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Upload the files of `folder` to the model repository `repo`, in one commit; with `dry_run` only list them.

    The snippet of the card then names `repo`, and `card.json` has of each path the last part. Folders inside `folder`,
    such as checkpoints, stay here. A dry run needs no network.

    Raises:
        UsageError: `repo` is no OWNER/NAME.
        ArtifactError: `folder` is not the finished output of `distill` or `prune`.
        UnsupportedModel: `folder` holds edits, which are no weights.
        ServerError: the hub refuses, or cannot be reached.
    """
    if not REPOSITORY.fullmatch(repo):
        raise UsageError(f"{repo!r} is no repository of the hub; write OWNER/NAME, such as you/student")
    check_finished(folder)
    contents = read_contents(folder, repo)
    license_name = read_front_matter(folder).get("license")
    return {
        "repo": repo,
        "private": private,
        "files": {name: _count_bytes(content) for name, content in contents.items()},
        "bytes": sum(map(_count_bytes, contents.values())),
        "license": license_name,
        "url": None if dry_run else _upload(contents, repo, private=private),
    }


def check_finished(folder: Path) -> None:
    """Refuse a folder that is not the finished output of `distill` or `prune`.

    Raises: ArtifactError; UnsupportedModel for edits, which no library of the hub reads.
    """
    _refuse_edits(folder)
    if (folder / TRAINING_FOLDER).exists():
        raise ArtifactError(f"the run in {folder} is not finished; give its command again with --resume")
    card = read_card(folder)
    try:
        count_bytes_on_disk(folder)
    except NotFound as error:
        raise ArtifactError(f"{folder} holds no weights; give the folder that distill or prune wrote") from error
    if not (folder / README_FILE).is_file() or set(MISSING_MEASURES) & set(card.get("failures") or ()):
        raise ArtifactError(f"{folder} has no finished model card; give its command again with --resume")


def _refuse_edits(folder: Path) -> None:
    if (folder / CONFIG_FILE).is_file() or not (folder / EDITS_FILE).is_file():
        return
    from potstill.models.edit_folder import find_base  # imports torch, which an upload does not need

    raise UnsupportedModel(
        f"{folder} holds edits of facts of {find_base(folder)}, and push uploads whole models; upload that model, "
        f"and make the edits again from their facts"
    )


def read_contents(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """The files to upload by name: a path, or the bytes of a file that the hub gets in another form."""
    contents: dict[str, Path | bytes] = {
        file.name: file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")
    }
    readme = (folder / README_FILE).read_text(encoding="utf-8")
    contents[README_FILE] = SNIPPET_NAME.sub(rf'\1"{repo}"', readme).encode()
    card = hide_folders_in(read_card(folder))
    contents[CARD_FILE] = (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode()
    return contents


def _count_bytes(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _upload(contents: dict[str, Path | bytes], repo: str, *, private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="Upload a model of potstill")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ServerError(
            f"the hub did not take {repo} ({reason[:200]}); sign in with `hf auth login`, or look with --dry-run"
        ) from error
    return str(commit.commit_url)
