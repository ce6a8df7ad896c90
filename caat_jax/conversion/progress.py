"""What a conversion has done so far, in a folder beside its output: to resume after a stop."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from caat_jax import files
from caat_jax.errors import InputError


class Progress:
    """Arrays by name; all that is kept was written completely."""

    def __init__(self, output: Path, settings: dict[str, Any]):
        """Opens the folder for `output`, or makes it.

        Args:
          output: where the conversion will be.
          settings: JSON-able: all that decides the result.

        Raises:
          InputError: a conversion with other settings was interrupted there.
        """
        self._folder = output.absolute().parent / f".{output.name}.unfinished"
        self._folder.mkdir(parents=True, exist_ok=True)
        path, content = self._folder / "settings.json", json.dumps(settings, indent=2)
        if not path.exists():
            files.write(path, content)
        elif path.read_text() != content:
            raise InputError(
                f"{self._folder} holds an interrupted conversion with other settings; resume that,"
                " remove the folder, or give another --output"
            )

    def load(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays saved under a name, None where there are none."""
        path = self._folder / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path) as arrays:
            return dict(arrays)

    def save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Saves arrays under a name."""
        content = io.BytesIO()
        np.savez(content, **arrays)
        files.write(self._folder / f"{name}.npz", content.getvalue())

    def remove(self) -> None:
        """Removes the folder: the conversion is complete."""
        shutil.rmtree(self._folder)
