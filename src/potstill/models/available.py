"""What can be used without a network: the packaged model and what the hub's cache holds."""

from typing import Any

from potstill.core.errors import MissingDependency
from potstill.models.load import PACKAGED, licence_of, packaged


def available() -> list[dict[str, Any]]:
    """Name, size, licence and place of every model that can be opened offline; never raises, never calls home."""
    return [*_packaged(), *_cached()]


def _packaged() -> list[dict[str, Any]]:
    try:
        path = packaged()
    except MissingDependency as error:
        return [{"name": PACKAGED, "bytes": 0, "licence": None, "path": str(error)}]
    return [{"name": PACKAGED, "bytes": path.stat().st_size, "licence": licence_of(path), "path": str(path)}]


def _cached() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = [
        {"name": r.repo_id, "bytes": r.size_on_disk, "licence": None, "path": str(r.repo_path)}
        for r in repos
        if r.repo_type == "model" and any(f.file_name == "config.json" for v in r.revisions for f in v.files)
    ]
    return sorted(found, key=lambda model: str(model["name"]))
