"""A folder of small documents, and the configuration that reads it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from caat_jax.config.sections import DataConfig
from configs import base


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """40 documents in the order of their files, tmp_path/texts/*.txt, some of them twice there."""
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"Document {i % 30}: " + "žluťoučký kůň 🐎\r\n" * (i % 30 % 4) for i in range(40)]
    for number, text in enumerate(texts):
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    return texts


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """`configs/base.py`'s for the files of `texts`, with what is overridden."""

    def make(**overrides) -> DataConfig:
        ours = {
            "files": str(tmp_path / "texts" / "*.txt"),
            "cache_dir": str(tmp_path / "cache"),
            "holdout_every": 4,
            "sequence_length": 16,
        }
        default = DataConfig(**base.get_config().data)
        return dataclasses.replace(default, **{**ours, **overrides})

    return make
