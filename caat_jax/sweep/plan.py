"""The runs of a sweep: every combination of the values that its grid gives to fields of a run.

A sweep's configuration (`configs/sweep.py`) has `run`, a configuration as `train.py` takes it;
`grid`, some of its fields, each with a tuple of values; `compared`, the name of the grid's field
whose first value is the baseline; and what is asked of the comparison: `margin`, `looks` and
`late_evaluations`.  Results are averaged over the field `seed`.
"""

import copy
import itertools
import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from caat_jax.config import resolve as config_resolve
from caat_jax.config.field_checks import at_least, within
from caat_jax.config.resolve import check_field_names, leaves
from caat_jax.config.sections import Config
from caat_jax.errors import InputError
from caat_jax.sweep import protocol
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
    margin: float  # nats a token; 0: none is stated, and no verdict given
    looks: tuple[int, ...]  # pairs at each look at the results, ascending
    late_evaluations: int  # whose mean is a run's loss
    runs: tuple[Run, ...]  # all of one seed before those of the next

    @property
    def fields(self) -> list[str]:
        """The grid's fields but the seed."""
        return [field for field in self.runs[0].settings if field != SEED]

    @property
    def seeds(self) -> list[int]:
        """In the order of the grid: the order in which pairs are added to a study."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def baseline_of(self, setting: tuple[Any, ...]) -> tuple[Any, ...]:
        """The setting that this one is compared with; itself, if it is a baseline."""
        place = self.fields.index(self.compared)
        return (*setting[:place], self.baseline, *setting[place + 1 :])


def all_fields() -> ConfigDict:
    """Every field that a sweep's configuration may have."""
    return ConfigDict(
        dict(
            run=base.get_config(),
            grid=base.get_config(),
            compared="",
            margin=0.0,
            looks=1,
            late_evaluations=1,
        )
    )


def resolve(sweep: ConfigDict) -> Plan:
    """Makes and checks the configuration of every run.

    Raises:
      InputError: a field of the grid is unknown or has no values, two values would be the same
        run, `compared` is not in the grid, what is asked of the comparison is impossible, or a
        run's configuration is refused.
    """
    if set(sweep) != set(all_fields()):
        raise InputError(
            f"--config has {', '.join(sorted(sweep)) or 'nothing'}; a sweep has"
            f" {', '.join(sorted(all_fields()))}, as configs/sweep.py does; train.py takes the"
            " configuration of one run"
        )
    _check_types(sweep)
    within("config.margin", sweep.margin, 0)
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
    seeds = list(dict.fromkeys(run.seed for run in runs.values()))
    return Plan(
        compared=sweep.compared,
        baseline=grid[sweep.compared][0],
        margin=float(sweep.margin),
        looks=_checked_looks(sweep.looks, sweep.margin, len(seeds)),
        late_evaluations=_checked_late_evaluations(sweep.late_evaluations, runs.values()),
        runs=tuple(sorted(runs.values(), key=lambda run: seeds.index(run.seed))),
    )


def _check_types(sweep: ConfigDict) -> None:
    """A file is a program: it can put anything into its ConfigDict."""
    for name, kinds in (("margin", (float, int)), ("looks", (int,)), ("late_evaluations", (int,))):
        if type(sweep[name]) not in kinds:
            kind = kinds[0].__name__
            raise InputError(f"config.{name}={sweep[name]!r} must be of type {kind}")


def _checked_looks(looks: int, margin: float, pairs: int) -> tuple[int, ...]:
    at_least("config.looks", looks, 1)
    if not margin:
        if looks != 1:
            raise InputError(f"config.looks={looks} without a config.margin must be 1")
        return (pairs,)
    if pairs < 2 * looks:
        raise InputError(
            f"config.looks={looks} at {pairs} seeds; a verdict takes at least 2 seeds for each look"
        )
    return protocol.look_sizes(pairs, looks)


def evaluated_steps(config: Config) -> list[int]:
    """After which steps of a run its validation loss is measured."""
    train = config.train
    return [*range(train.eval_every, train.steps, train.eval_every), train.steps]


def _checked_late_evaluations(late: int, runs: Iterable[Run]) -> int:
    at_least("config.late_evaluations", late, 1)
    for run in runs:
        evaluations = len(evaluated_steps(run.config))
        if late > evaluations:
            raise InputError(
                f"config.late_evaluations={late} is more than the {evaluations} of the run"
                f" {run.name} (train.steps={run.config.train.steps}, train.eval_every"
                f"={run.config.train.eval_every})"
            )
    return late


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
