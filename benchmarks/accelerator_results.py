"""The stages of `accelerator.py` in order, and their results, read and as tables."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STAGES = (
    "device",
    "reference",
    "train_130m",
    "train_1b",
    "torch_train",
    "generate",
    "torch_generate",
    "schedule",
    "quality",
)


def read(results: Path) -> list[dict[str, Any]]:
    """All results so far, in order."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def as_tables(records: Iterable[dict[str, Any]]) -> str:
    """Markdown: a table for each stage, and the errors."""
    parts = []
    stages: dict[str, list[dict]] = {}
    for record in records:
        stages.setdefault(record["stage"], []).append(record)
    for stage, found in stages.items():
        names = list(dict.fromkeys(k for record in found for k in record if k != "stage"))
        rows = [names, ["---"] * len(names)]
        rows += [[_cell(record.get(name, "")) for name in names] for record in found]
        parts.append(f"## {stage}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")
