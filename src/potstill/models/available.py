"""The models that work offline: the packaged one, and those in the hub's cache."""

from typing import Any

from potstill.core.errors import MissingDependency
from potstill.models.lineage import PACKAGED_LICENSE
from potstill.models.locate import PACKAGED_MODEL, get_packaged_path


def list_available_models() -> list[dict[str, Any]]:
    """Name, size in bytes, license and path of every model that opens offline; this uses no network."""
    return [*_list_packaged_models(), *_list_cached_models()]


def _list_packaged_models() -> list[dict[str, Any]]:
    try:
        path = get_packaged_path()
    except MissingDependency as error:
        return [{"name": PACKAGED_MODEL, "bytes": 0, "licence": None, "path": str(error)}]
    return [{"name": PACKAGED_MODEL, "bytes": path.stat().st_size, "licence": PACKAGED_LICENSE, "path": str(path)}]


def _list_cached_models() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = [
        {"name": repo.repo_id, "bytes": repo.size_on_disk, "licence": None, "path": str(repo.repo_path)}
        for repo in repos
        if repo.repo_type == "model"
        and any(file.file_name == "config.json" for revision in repo.revisions for file in revision.files)
    ]
    return sorted(models, key=lambda model: str(model["name"]))
