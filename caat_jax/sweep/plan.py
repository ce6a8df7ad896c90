"""The runs of a sweep: every combination of the values that its grid gives to fields of a run.

A sweep's configuration (`configs/sweep.py`) has `run`, a configuration as `train.py` takes it;
`grid`, some of its fields, each with a tuple of values; and `compared`, the name of the grid's
field whose first value is the baseline.  Results are averaged over the field `seed`.
"""

import copy
import itertools
import re
import zlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from caat_jax.config import resolve as config_resolve
from caat_jax.config.resolve import check_field_names, leaves
from caat_jax.config.sections import Config
from caat_jax.errors import InputError
from configs import base

SEED = "seed"

_LONGEST_NAME = 40  # of a value, in a folder's name


class Run(NamedTuple):
    """One of a sweep's runs."""

    name: str  # of its folder
    settings: dict[str, Any]  # the grid's fields, "seed" among them where the grid has it
    config: Config

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def setting(self) -> tuple[Any, ...]:
        """The values of all the grid's fields but the seed, in the order of their names."""
        return tuple(value for field, value in self.settings.items() if field != SEED)


class Plan(NamedTuple):
    """A checked sweep."""

    compared: str  # a field's name, as "model.sync_factor"
    baseline: Any  # its value that the others are compared with
    runs: tuple[Run, ...]

    @property
    def fields(self) -> list[str]:
        """The grid's fields but the seed."""
        return [field for field in self.runs[0].settings if field != SEED]


def all_fields() -> ConfigDict:
    """Every field that a sweep's configuration may have."""
    return ConfigDict(dict(run=base.get_config(), grid=base.get_config(), compared=""))


def resolve(sweep: ConfigDict) -> Plan:
    """Makes and checks the configuration of every run.

    Raises:
      InputError: a field of the grid is unknown or has no values, two values would be the same
        run, `compared` is not in the grid, or a run's configuration is refused.
    """
    if set(sweep) != {"run", "grid", "compared"}:
        raise InputError(
            f"--config has {', '.join(sorted(sweep)) or 'nothing'}; a sweep has compared, grid and"
            " run, as configs/sweep.py does; train.py takes the configuration of one run"
        )
    grid = dict(leaves(sweep.grid))
    check_field_names(list(grid), sweep.run)
    for field, values in grid.items():
        if not isinstance(values, tuple | list) or not values:
            raise InputError(f"config.grid.{field}={values!r} must be a tuple of values")
    if sweep.compared not in grid or sweep.compared == SEED:
        raise InputError(
            f"config.compared={sweep.compared!r} is not in the grid; it has"
            f" {', '.join(field for field in grid if field != SEED) or 'none'}"
        )
    runs: dict[str, Run] = {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = "-".join(f"{f.split('.')[-1]}_{_text(v)}" for f, v in settings.items())
        if name in runs:
            raise InputError(f"config.grid has the run {name} twice; give each value once")
        runs[name] = Run(name, settings, _configuration(sweep.run, settings))
    return Plan(sweep.compared, grid[sweep.compared][0], tuple(runs.values()))


def _configuration(run: ConfigDict, settings: dict[str, Any]) -> Config:
    fields = copy.deepcopy(run)
    for name, value in settings.items():
        *sections, field = name.split(".")
        section = fields
        for part in sections:
            section = section[part]
        try:
            section[field] = value
        except TypeError as error:  # of another type than the field's
            raise InputError(f"config.grid.{name}: {error}") from None
    return config_resolve.resolve(fields)


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = re.sub(r"[^\w.+-]+", "_", str(value)).strip("_") or "none"
    return text if len(text) <= _LONGEST_NAME else f"{zlib.crc32(text.encode()):08x}"
