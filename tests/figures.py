"""The pages, the results files beside them, and sentences that must stand on a page."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def read_json(name):
    return json.loads((DOCS / name).read_text())


def read_csv(name):
    with (DOCS / name).open() as file:
        return list(csv.DictReader(file))


def words(text):
    """Without what differs between a sentence and its place on a page: lines, stars, bullets."""
    return " ".join(
        text.replace("*", "")
        .replace("\N{MINUS SIGN}", "-")
        .replace("\N{MULTIPLICATION SIGN}", "x")
        .split()
    )


def page(name):
    return words((ROOT / name).read_text(encoding="utf-8"))


def missing(sentences: Iterable[tuple[str, str, Sequence | dict]]) -> list[str]:
    """Those that their page lacks: (page, sentence, what fills it in)."""
    lacking = []
    for where, sentence, figures in sentences:
        filled = (
            sentence.format(**figures) if isinstance(figures, dict) else sentence.format(*figures)
        )
        if words(filled) not in page(where):
            lacking.append(f"{where}: {filled}")
    return lacking
