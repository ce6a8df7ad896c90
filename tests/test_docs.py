"""The files, links and commands that the pages name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = "caat_jax|configs|tests|benchmarks|docs|launch"


def missing(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    paths = re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./]*\w)(?![\w$*])", text)
    modules = re.findall(r"python3? -m ((?:caat_jax|benchmarks|tests)(?:\.\w+)+)", text)
    files = [page.parent / link for link in links] + [ROOT / path for path in paths]
    for module in modules:
        path = ROOT / module.replace(".", "/")
        files.append(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"))
    return [str(file.relative_to(ROOT)) for file in files if not file.exists()]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_are_headings(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text)
    wrong = [
        f"{name}#{anchor}"
        for name, anchor in links
        if anchor not in anchors(page.parent / name if name else page)
    ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    assert missing(page) == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
