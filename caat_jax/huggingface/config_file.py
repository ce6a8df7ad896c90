"""The configuration of an import or a conversion, for `train.py --config=WORKDIR/config.py`."""

from pathlib import Path
from typing import Any

from caat_jax.config.sections import Config
from caat_jax.config.stored import base_fields
from caat_jax.data import carried_tokenizer
from configs import base

NAME = "config.py"

_HEAD = '''"""A model to train on: `configs/base.py` with its architecture and tokeniser.

    python train.py --config=WORKDIR/config.py --workdir=WORKDIR --config.data.files=PATTERN

The learning rate and the number of steps are those of `configs/base.py`, which knows nothing of
this model: give others.
"""

from pathlib import Path

from configs import base


def get_config():
    config = base.get_config()
'''


def source_code(config: Config, workdir: Path) -> str:
    """A program that gives the model and the text where they differ from `configs/base.py`.

    Args:
      config: the model's.
      workdir: the folder with its tokeniser, in which the program will be.
    """
    fields = base_fields(config)
    factors = {factor for pair in config.model.sync_factors for factor in pair}
    if len(factors) == 1:
        fields["model"] |= {"sync_factor": factors.pop(), "sync_factor_per_layer": ()}
    usual = base.get_config()
    lines = []
    for section in ("model", "data"):
        for name in usual[section]:
            value = fields[section].get(name, usual[section][name])
            if value != usual[section][name]:
                lines.append(f"    config.{section}.{name} = {_code(name, value, workdir)}\n")
    return f"{_HEAD}{''.join(lines)}    return config\n"


def _code(name: str, value: Any, workdir: Path) -> str:
    if name == "tokenizer":
        path = Path(carried_tokenizer.find(value, workdir))
        if path.is_relative_to(workdir):  # which may be moved
            return f'str(Path(__file__).absolute().parent / "{path.relative_to(workdir)}")'
    return repr(value)
