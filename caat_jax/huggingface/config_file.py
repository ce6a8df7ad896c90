"""The configuration of an import as a file for `train.py --config=WORKDIR/config.py`."""

from pathlib import Path
from typing import Any

from caat_jax.config.sections import Config
from caat_jax.config.stored import to_json
from configs import base

NAME = "config.py"

_HEAD = '''"""An imported Llama, to train on: `configs/base.py` with its architecture and tokeniser.

    python train.py --config=WORKDIR/config.py --workdir=WORKDIR --config.data.files=PATTERN

The learning rate and the number of steps are those of `configs/base.py`, which knows nothing of
this model: give others.
"""

from pathlib import Path

from configs import base


def get_config():
    config = base.get_config()
'''


def source_code(config: Config) -> str:
    """A program that gives the fields in which an import differs from `configs/base.py`."""
    fields: dict[str, Any] = to_json(config)
    fields["model"]["sync_factor"] = fields["model"].pop("sync_factors")[0][0]
    usual = base.get_config()
    lines = []
    for section in ("model", "data"):
        for name in usual[section]:
            value = fields[section].get(name, usual[section][name])
            if value != usual[section][name]:
                lines.append(f"    config.{section}.{name} = {_code(name, value)}\n")
    return f"{_HEAD}{''.join(lines)}    return config\n"


def _code(name: str, value: Any) -> str:
    if name != "tokenizer":
        return repr(value)
    # The workdir may be moved.
    path = Path(value)
    return f'str(Path(__file__).absolute().parent / "{path.parent.name}" / "{path.name}")'
