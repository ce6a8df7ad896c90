"""A resolved configuration as JSON, as checkpoints carry it; and how two of them differ."""

import dataclasses
from typing import Any, TypeVar

from caat_jax.config.architecture import Architecture, Stage, SyncFactors
from caat_jax.config.sections import (
    Compute,
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from caat_jax.errors import InputError

_Section = TypeVar("_Section")


def base_fields(config: Config) -> dict[str, Any]:
    """The fields of `configs/base.py` that resolve back to this configuration, by section.

    All but `model.sync_factor`, which `model.sync_factor_per_layer` overrides.
    """
    sections = dataclasses.asdict(config)
    sections["model"]["sync_factor_per_layer"] = sections["model"].pop("sync_factors")
    return sections


def to_json(config: Config) -> dict[str, Any]:
    """A JSON-able dictionary; `from_json` reads it back."""
    return dataclasses.asdict(config)


def from_json(fields: dict[str, Any]) -> Config:
    """The configuration that `to_json` wrote.

    Raises:
      InputError: it was written by another version of this project, with other fields, or by
        something else.
    """
    try:
        # Checkpoints that are older than a field did without.
        model = {"vocab_padding": 0, **fields["model"]}
        model["sync_factors"] = _pairs(model["sync_factors"])
        train = {"sync_schedule": (), "teacher": "", **fields["train"]}
        train["sync_schedule"] = tuple(
            Stage(until, _pairs(factors)) for until, factors in train["sync_schedule"]
        )
        data = {"own_text": False, **fields["data"]}
        cooldown = fields["optimizer"]["decay_steps"] // 5  # as the default, which a cosine ignores
        optimizer = {"schedule": "cosine", "cooldown_steps": cooldown, **fields["optimizer"]}
        # Nor had wires blocks, nothing emulated them, and batches had no parts.
        added = {"wire_block": 128, "emulate_wires": False, "batch_parts": 0}
        compute = added | fields["compute"]
        return _typed(
            Config(
                seed=fields["seed"],
                model=_typed(Architecture(**model)),
                compute=_typed(Compute(**compute)),
                mesh=_typed(MeshConfig(**fields["mesh"])),
                data=_typed(DataConfig(**data)),
                optimizer=_typed(OptimizerConfig(**optimizer)),
                train=_typed(TrainConfig(**train)),
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the stored configuration has other fields than this version's ({error})"
        ) from error


def _typed(section: _Section) -> _Section:
    """The section, when its numbers, words and factors are such."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        kinds = {int: (int,), float: (float, int), bool: (bool,), str: (str,)}.get(field.type)
        if kinds and type(value) not in kinds:
            raise TypeError(f"{field.name} is {value!r}")
        if field.name == "sync_factors" and not _are_factors(value):
            raise TypeError(f"sync_factors is {value!r}")
    return section


def _are_factors(factors: Any) -> bool:
    return all(len(pair) == 2 and all(type(p) in (int, float) for p in pair) for pair in factors)


def _pairs(lists: list[list[float]]) -> SyncFactors:
    return tuple(tuple(pair) for pair in lists)


def difference(stored: Any, given: Any, section: str = "") -> list[str]:
    """The fields in which two `Config`, or a section of each, differ: `NAME: stored, requested`."""
    differing = []
    for field in dataclasses.fields(stored):
        name = section + field.name
        stored_value, requested = getattr(stored, field.name), getattr(given, field.name)
        if dataclasses.is_dataclass(stored_value):
            differing += difference(stored_value, requested, f"{name}.")
        elif stored_value != requested:
            if field.name == "sync_factors":
                stored_value = stored.describe_sync_factors()
                requested = given.describe_sync_factors()
            differing.append(f"{name}: stored {stored_value}, requested {requested}")
    return differing
