"""What a factor costs in time on given chips and links, by the model of `caat_jax.step_time`.

A sublayer at 0 waits for nothing; one at 0.01 pays the whole latency of its reductions.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp

from caat_jax.config.architecture import SyncFactors
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.devices import chips
from caat_jax.devices.chips import Chip
from caat_jax.errors import InputError
from caat_jax.sensitivity.plans import Limit
from caat_jax.step_time import model
from caat_jax.step_time.model import Prediction

WORKLOADS = {"train": "train", "prefill": "read prompts", "decode": "decode"}

_UNITS = 1000  # of time, in what the largest factor costs one sublayer


class LinkTimes:
    """Predicted seconds of one workload, by the factors of the model."""

    def __init__(
        self, config: Config, workload: str, batch: int, length: int, devices: int, chip: Chip
    ):
        """Lays the model's shards out over as many devices as divide them, sequences over the rest.

        Args:
          config: of the model.  A chip of the table is given its FLOP/s' type, bfloat16.
          workload: of WORKLOADS: a training step, a prefill, or a token for each sequence.
          batch: sequences, over all devices.
          length: tokens of each, or slots of the cache.
          devices: how many chips.
          chip: whose figures to take.

        Raises:
          InputError: nothing would be sent, or the sequences do not divide over the devices.
        """
        for name, value in (("batch", batch), ("length", length), ("devices", devices)):
            if value < 1:
                raise InputError(f"--{name}={value} must be at least 1")
        shards = config.model.tp_shards
        held_by = math.gcd(devices, shards)
        if held_by == 1:
            raise InputError(
                f"--devices={devices} has no divisor above 1 in common with the model's {shards}"
                " shards: nothing would be sent"
            )
        if batch % (devices // held_by):
            raise InputError(
                f"--batch={batch} must be a multiple of {devices // held_by}, since"
                f" --devices={devices} hold the model so often"
            )
        mesh = MeshConfig(devices // held_by, 1, held_by, simulated_devices=0)
        self._config = dataclasses.replace(
            _in_type_of(chip, config),
            mesh=mesh,
            data=dataclasses.replace(config.data, sequence_length=length),
            train=dataclasses.replace(config.train, global_batch=batch, accumulation_steps=1),
        )
        self.workload, self.chip = workload, chip
        self._prediction = functools.cache(self._predict)
        self.description = (
            f"{workload}, {batch} x {length}, {devices} x {chip.name}, {held_by} of them a model"
        )

    def _predict(self, sync_factors: SyncFactors) -> Prediction:
        config = self._config.with_sync_factors(sync_factors)
        if self.workload == "train":
            return model.predict(model.workload(config), self.chip)
        return model.predict(model.inference_workload(config, self.workload), self.chip)

    def seconds(self, sync_factors: SyncFactors) -> float:
        """Of one step or token; gathers and sums of gradients run beside compute."""
        return self._prediction(sync_factors).step(overlap=True)

    def speed_up(self, sync_factors: SyncFactors) -> float:
        """Over p = 1."""
        return self.seconds(self._everywhere(1.0)) / self.seconds(sync_factors)

    def cost(self, factor: float) -> int:
        """Units of time that one sublayer waits for its reductions, rounded up."""
        return math.ceil(self._waiting(factor) / self._unit - 1e-9)

    def limit(self, speed_up: float, sync_factors: Sequence[float]) -> Limit:
        """A time that is p = 1's over `speed_up`.

        Raises:
          InputError: these factors cannot reach it.
        """
        if not 1 <= speed_up < math.inf:
            raise InputError(f"--speedup={speed_up} must be a number from 1 on")
        full, nothing_sent = (self.seconds(self._everywhere(p)) for p in (1.0, 0.0))
        allowed = math.floor((full / speed_up - nothing_sent) / self._unit + 1e-9)
        owns = [p for pair in self._config.model.sync_factors for p in pair]
        smallest = tuple(min(own, *sync_factors) for own in owns)
        if allowed < sum(map(self.cost, smallest)):
            pairs = tuple(zip(smallest[::2], smallest[1::2], strict=True))
            raise InputError(
                f"--speedup={speed_up} is out of reach; the smallest factors in --cut_to give"
                f" {math.floor(1000 * self.speed_up(pairs)) / 1000:g}"
            )
        purpose = (
            f"Predicted to {WORKLOADS[self.workload]} at least {speed_up:g} times as fast as p = 1"
        )
        return Limit(f"speedup={speed_up}", purpose, self.cost, allowed)

    @property
    def _unit(self) -> float:
        return self._waiting(1.0) / _UNITS

    def _waiting(self, factor: float) -> float:
        """Seconds that one sublayer adds to a run in which no layer sends anything."""

        def of_all(p: float) -> float:
            found = self._prediction(self._everywhere(p))
            return found.reductions + found.quantising

        return (of_all(factor) - of_all(0.0)) / (2 * self._config.model.layers)

    def _everywhere(self, factor: float) -> SyncFactors:
        return ((factor, factor),) * self._config.model.layers


def _in_type_of(chip: Chip, config: Config) -> Config:
    """The configuration in a type that the chip's FLOP/s are known for."""
    compute = config.compute
    if chip not in chips.CHIPS or compute.dtype == "bfloat16":
        return config
    forward = compute.forward_wire_dtype
    if jnp.dtype(forward).itemsize > 2:
        forward = "bfloat16"
    compute = dataclasses.replace(compute, dtype="bfloat16", forward_wire_dtype=forward)
    return dataclasses.replace(config, compute=compute)
