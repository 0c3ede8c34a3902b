"""Every relative link and anchor in the documentation leads somewhere, as GitHub resolves them.

`make check` runs this file without fixtures.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.ipynb")])
CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*(?P<target>[^)\s]+)[^)]*\)|(?:href|src)=\"(?P<attribute>[^\"]+)\"")
REFERENCE = ROOT / "docs/reference"  # its pages are complete on the site only, so no other page links to them


def read_text(page: Path) -> str:
    """The Markdown of a page or of a notebook."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def list_links(text: str) -> list[str]:
    """The targets of the links of a page, outside code."""
    return [match["target"] or match["attribute"] for match in LINK.finditer(CODE.sub("", text))]


@cache
def list_anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page, the names that it sets itself, and those of its objects."""
    text = read_text(page)
    prose = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    anchors: set[str] = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", prose))
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = next(n for n in range(99) if (slug if n == 0 else f"{slug}-{n}") not in anchors)
        anchors.add(f"{slug}-{number}" if number else slug)
    return frozenset(anchors)


def find_broken_links(page: Path) -> list[str]:
    """The links of a page whose file or anchor does not exist; links to other hosts are not tried."""
    broken = []
    for link in list_links(read_text(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", link) or page.parent == target.parent == REFERENCE:
            continue
        exists = target.is_relative_to(ROOT) and target.exists() and target.parent != REFERENCE
        if not exists or (anchor and target.suffix == ".md" and anchor not in list_anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert not find_broken_links(page)


def test_every_page_of_the_docs_is_in_the_navigation_of_the_site() -> None:
    navigation = read_text(ROOT / "mkdocs.yml").partition("\nnav:")[2]
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    assert not pages - set(re.findall(r"[\w/-]+\.md", navigation))


@pytest.mark.parametrize("link", ["gone.md", "#gone", "b.md#gone", "../../outside.md"])
def test_a_broken_link_is_seen(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# A title: `code`, twice\n## The same\n## The same\n")
    page = tmp_path / "a.md"
    page.write_text(f"# Here\n[a](b.md#a-title-code-twice) [b](b.md#the-same-1) [c](#here) `[d](d.md)` [e]({link})\n")
    assert find_broken_links(page) == [link]
