"""Predicts the time of a program from its trace and a chip's figures: training, prefill, decode.

    product       max(FLOPs / (peak · efficiency), bytes / memory rate); attention over a whole
                  sequence: the FLOPs alone
    optimizer     bytes / memory rate
    quantising    bytes / memory rate, where reductions send 8 bits a number
    collective    hops · latency + bytes each device sends / bandwidth

A ring of n devices takes n − 1 hops to gather or to scatter, and both for an all-reduce.  Of a
compiled step, what its schedule does not hide is exposed (`communication.exposure`).  Without one,
all of each reduction over `model` is, since it stands between two products of its layer; the
gathers of parameters and the sums of gradients (`fsdp`, `data`) depend on nothing close by and can
run while the device computes, so there are two bounds: all of them do, and none.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from caat_jax.communication import exposure, traced_programs
from caat_jax.communication.audit import Audit
from caat_jax.communication.collectives import Collective
from caat_jax.communication.traced_programs import MatrixProduct, Operations
from caat_jax.config.sections import Config
from caat_jax.devices import sharding
from caat_jax.devices.chips import Chip
from caat_jax.inference.programs import InferencePrograms
from caat_jax.model.scopes import ATTENTION_SCOPE
from caat_jax.training.metrics import model_flops_per_token
from caat_jax.training.step import Programs

# float32 arrays the size of the parameters that AdamW with clipping moves: it reads the gradient
# for its norm, then gradient, parameter and two moments, and writes the last three.
_OPTIMIZER_PASSES = 8
_FLOAT32 = 4
_CAN_OVERLAP = ("parameter gather", "gradient reduction")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every device does in one run of a program, whatever the chip."""

    config: Config  # its mesh has no size left at -1
    operations: Operations
    parameters: int  # that one device updates: those that it holds, none in inference
    state_bytes: int  # parameters, moments and counters of one device; in inference the weights
    # Attention reads little more than it writes, in a kernel of its own; of a cache it reads all.
    fused_attention: bool = True

    @property
    def devices(self) -> int:
        mesh = self.config.mesh
        return mesh.data * mesh.fsdp * mesh.model

    @property
    def tokens(self) -> int:
        """Of one step, over all devices."""
        return self.config.train.global_batch * self.config.data.sequence_length

    @property
    def shared(self) -> float:
        """The mean over sublayers of D_s / D."""
        widths = [width for pair in self.config.model.sync_widths for width in pair]
        return sum(widths) / len(widths) / self.config.model.embed_dim


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The seconds of one run on one chip.

    `overlap` below: True when all communication that can run beside compute does, False when
    none does.
    """

    workload: Workload
    chip: Chip
    products: float
    optimizer: float
    quantising: float
    reductions: float  # over `model`, and the loss's; of a compiled step all that is exposed
    overlappable: float  # gathers of parameters, sums of gradients; none of a compiled step

    @property
    def compute(self) -> float:
        return self.products + self.optimizer + self.quantising

    def exposed(self, overlap: bool) -> float:
        """Communication during which nothing is computed."""
        hidden = min(self.compute, self.overlappable) if overlap else 0.0
        return self.reductions + self.overlappable - hidden

    def step(self, overlap: bool) -> float:
        return self.compute + self.exposed(overlap)

    def tokens_per_second(self, overlap: bool) -> float:
        """Of one device."""
        return self.workload.tokens / self.workload.devices / self.step(overlap)

    def mfu(self, overlap: bool) -> float:
        """Model FLOPs utilisation, a fraction of 1."""
        config = self.workload.config
        per_token = model_flops_per_token(config.model, config.data.sequence_length)
        return self.tokens_per_second(overlap) * per_token / self.chip.flops

    @property
    def state_fits(self) -> bool:
        """Whether the training state alone fits into memory; activations come on top."""
        return self.workload.state_bytes <= self.chip.memory_bytes


def workload(config: Config) -> Workload:
    """Traces the training step on a mesh without devices, and counts.

    Args:
      config: with every mesh size and the vocabulary known.
    """
    programs = Programs(config, sharding.abstract_mesh(config.mesh))
    return Workload(
        config=config,
        operations=traced_programs.count(programs.trace_train_step().jaxpr),
        parameters=sum(_local_sizes(programs.state_shapes.parameters)),
        state_bytes=sum(
            size * leaf.dtype.itemsize
            for size, leaf in zip(
                _local_sizes(programs.state_shapes),
                jax.tree.leaves(programs.state_shapes),
                strict=True,
            )
        ),
    )


def inference_workload(config: Config, program: str) -> Workload:
    """Traces a program of generation, for `train.global_batch` sequences, and counts.

    Args:
      config: as for `workload`.
      program: "prefill", of prompts of `data.sequence_length` tokens, or "decode", of one token
        from a cache of so many slots.
    """
    programs = InferencePrograms(config, sharding.abstract_mesh(config.mesh))
    trace = {"prefill": programs.trace_prefill, "decode": programs.trace_decode}[program]
    traced = trace(config.train.global_batch, config.data.sequence_length)
    weights = jax.tree.leaves(programs.weight_shapes())
    return Workload(
        config=config,
        operations=traced_programs.count(traced.jaxpr),
        parameters=0,
        state_bytes=sum(
            size * leaf.dtype.itemsize
            for size, leaf in zip(_local_sizes(weights), weights, strict=True)
        ),
        fused_attention=program == "prefill",
    )


def predict(
    work: Workload, chip: Chip, efficiency: float = 1.0, schedule: Audit | None = None
) -> Prediction:
    """The time of this work on this chip.

    Args:
      work: see `workload`, `inference_workload`.
      chip: whose figures to take.
      efficiency: the share of the peak FLOP/s that matrix products reach, above 0, at most 1.
      schedule: the step compiled for this chip: its transfers, and what hides them there.
    """
    mesh, counted = work.config.mesh, work.operations
    reductions, overlappable = 0.0, 0.0
    for collective in (schedule or counted).collectives:
        time = exposure.of_one(collective, chip, vars(mesh), efficiency)
        seconds = collective.times * time.exposed
        if schedule is None and collective.place in _CAN_OVERLAP:
            overlappable += seconds
        else:
            reductions += seconds
    return Prediction(
        workload=work,
        chip=chip,
        products=sum(
            p.times * product_seconds(p, chip, efficiency, work.fused_attention)
            for p in counted.products
        ),
        optimizer=_OPTIMIZER_PASSES * _FLOAT32 * work.parameters / chip.memory_rate,
        quantising=sum(
            c.times * quantising_bytes(c, jnp.dtype(work.config.compute.dtype).itemsize)
            for c in counted.collectives
        )
        / chip.memory_rate,
        reductions=reductions,
        overlappable=overlappable,
    )


def product_seconds(
    product: MatrixProduct, chip: Chip, efficiency: float, fused_attention: bool = True
) -> float:
    """One execution: arithmetic and memory traffic run beside each other.

    A fused kernel computes attention on accelerators: its scores never reach the memory.
    """
    arithmetic = product.flops / (chip.flops * efficiency)
    if fused_attention and ATTENTION_SCOPE in product.name:
        return arithmetic
    return max(arithmetic, product.bytes / chip.memory_rate)


def quantising_bytes(collective: Collective, activation_bytes: int) -> float:
    """What quantising reads and writes around a collective of bytes, nothing around another.

    Activations are read for the scales, read again and written as bytes; the parts that arrive are
    read, and their sum, float32, is written, read twice and written as bytes.  After the all-gather
    the bytes are read and activations written.
    """
    numbers = sum(math.prod(shape) for dtype, shape in collective.arrays if dtype == "uint8")
    if collective.kind == "all-to-all":
        of_sum = (3 * _FLOAT32 + 1) / collective.group_size
        return numbers * (2 * activation_bytes + 2 + of_sum)
    return numbers * (1 + activation_bytes)


def _local_sizes(shapes: Any) -> list[int]:
    """The elements of each leaf that lie on one device."""
    return [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(shapes)]
