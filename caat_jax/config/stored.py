"""A resolved configuration as JSON, as checkpoints carry it; and how two of them differ."""

import dataclasses
from typing import Any

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
      InputError: it was written by another version of this project, with other fields.
    """
    try:
        model = dict(fields["model"])
        model["sync_factors"] = _pairs(model["sync_factors"])
        # Checkpoints that are older than the field had no schedule.
        train = {"sync_schedule": (), **fields["train"]}
        train["sync_schedule"] = tuple(
            Stage(until, _pairs(factors)) for until, factors in train["sync_schedule"]
        )
        return Config(
            seed=fields["seed"],
            model=Architecture(**model),
            compute=Compute(**fields["compute"]),
            mesh=MeshConfig(**fields["mesh"]),
            data=DataConfig(**fields["data"]),
            optimizer=OptimizerConfig(**fields["optimizer"]),
            train=TrainConfig(**train),
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the stored configuration has other fields than this version's ({error})"
        ) from error


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
