"""Where a model comes from: its id on the hub, its license, and the languages that its model card names."""

import re
from pathlib import Path
from typing import Any

import yaml

from potstill.core.atomic_files import CARD_FILE
from potstill.models.gguf_files import read_metadata
from potstill.models.locate import HUB_ID, PACKAGED_MODEL, split_size

PACKAGED_HUB_ID, PACKAGED_LANGUAGES = "HuggingFaceTB/SmolLM2-135M-Instruct", ("en",)
PACKAGED_LICENSE = "apache-2.0"  # also in the file, whose metadata takes seconds to read


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The YAML header of a folder's `README.md`; empty where there is none, or none that can be read."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8", "replace") if readme.is_file() else ""
    front_matter = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        facts = yaml.safe_load(front_matter[1]) if front_matter else {}
    except yaml.YAMLError:
        return {}
    return facts if isinstance(facts, dict) else {}


def read_license(path: Path) -> str | None:
    """The license in a GGUF file's metadata, or in the front matter of a folder's README; None if there is none."""
    if path.is_file():
        license_field = read_metadata(path).get("license")
        return str(license_field) if license_field else None
    license_name = read_front_matter(path).get("license")
    if isinstance(license_name, list):
        license_name = ", ".join(map(str, license_name))
    return str(license_name) if license_name else None


def find_hub_id(name: str, folder: Path) -> str:
    """The id on the hub of the model called `name`, whose files are in `folder`; empty where it is not known.

    A folder that potstill wrote has the id of the model that it was made from. Any other folder has none.
    """
    name = split_size(name).model
    if name == PACKAGED_MODEL:
        return PACKAGED_HUB_ID
    if not Path(name).expanduser().exists():
        return name if HUB_ID.fullmatch(name) else ""
    base_model = read_front_matter(folder).get("base_model") if (folder / CARD_FILE).is_file() else ""
    return base_model if isinstance(base_model, str) else ""


def read_languages(name: str, folder: Path) -> tuple[str, ...]:
    """The languages of a model, such as `en`, that its card names."""
    if name == PACKAGED_MODEL:
        return PACKAGED_LANGUAGES
    languages = read_front_matter(folder).get("language") or ()
    return (languages,) if isinstance(languages, str) else tuple(str(language) for language in languages)
