"""From an `ml_collections` ConfigDict to a checked `Config`; every field is checked.

`resolve(config_dict)` raises `InputError` before anything is compiled or written.  What can only
be checked against something else is checked where both are known: the mesh against the devices in
`resolve_mesh`, the vocabulary against the tokeniser in `Config.with_vocabulary`.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from caat_jax.config.architecture import Architecture, checked_architecture, checked_schedule
from caat_jax.config.field_checks import (
    LARGEST_BELOW_ONE,
    above_zero,
    at_least,
    nearest_multiples,
    one_of,
    within,
)
from caat_jax.config.sections import (
    Compute,
    Config,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    cudnn_supports,
)
from caat_jax.config.user_paths import refuse_url
from caat_jax.errors import InputError
from configs import base

DTYPES = ("float32", "bfloat16")
FORWARD_WIRE_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")
BACKWARD_WIRE_DTYPES = (*FORWARD_WIRE_DTYPES, "float8_e5m2")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
ATTENTION_KERNELS = ("auto", "plain", "splash", "cudnn")
# What says which documents of which corpus; where it lies, and how it is decoded, is apart.
_CORPUS_FIELDS = ("tfds_name", "files", "text_feature", "train_split", "eval_split")
# More would take hours to start.
LARGEST_SIMULATED_DEVICES = 1024


def resolve(config: ConfigDict) -> Config:
    """Checks every field on its own and against its neighbours.

    Raises:
      InputError: naming the field, its value and what is allowed.
    """
    if {"run", "grid"} <= set(config):
        raise InputError(
            "--config is a sweep's, with a grid: python -m caat_jax.sweep takes it; give the"
            " configuration of one run, such as configs/tiny.py"
        )
    _check_types(config)
    model = checked_architecture(dict(config.model))
    schedule = checked_schedule(config.train.sync_schedule, model.layers)
    train = TrainConfig(**{**config.train, "sync_schedule": schedule})
    _check_train(train)
    optimizer = dict(config.optimizer)
    if optimizer["decay_steps"] == -1:
        optimizer["decay_steps"] = train.steps
    if optimizer["warmup_steps"] == -1:
        optimizer["warmup_steps"] = optimizer["decay_steps"] // 10
    if optimizer["cooldown_steps"] == -1:
        optimizer["cooldown_steps"] = optimizer["decay_steps"] // 5
    optimizer = OptimizerConfig(**optimizer)
    _check_optimizer(optimizer)
    data = DataConfig(**config.data)
    _check_data(data)
    at_least("seed", config.seed, 0)
    mesh = MeshConfig(**config.mesh)
    check_mesh(mesh, model.tp_shards)
    return Config(
        seed=config.seed,
        model=model,
        compute=_compute(dict(config.compute), model),
        mesh=mesh,
        data=data,
        optimizer=optimizer,
        train=train,
    )


def with_data(config: Config, fields: dict[str, Any]) -> Config:
    """A configuration, out of a checkpoint, with other fields of `config.data` to evaluate on.

    Another `files` or `tfds_name` replaces the corpus; its splits and feature are then the usual
    ones where `fields` has no others.  `holdout_every` may be 1: all documents are held out.

    Raises:
      InputError: naming the field, its value and what is allowed.
    """
    usual = base.get_config().data
    if "tokenizer" in fields and config.data.tokenizer != usual.tokenizer:
        raise InputError(
            f"--config.data.tokenizer={fields['tokenizer']}: the checkpoint has its own,"
            f" {config.data.tokenizer}"
        )
    if fields.keys() & {"files", "tfds_name"}:
        fields = {name: usual[name] for name in _CORPUS_FIELDS} | fields
    data = dataclasses.replace(config.data, **fields)
    _check_data(data, least_holdout=1)
    return dataclasses.replace(config, data=data)


def _check_types(config: ConfigDict) -> None:
    """A file is a program: it can unlock its ConfigDict and put anything into it."""
    defaults, given = dict(leaves(base.get_config())), dict(leaves(config))
    check_field_names([name for name in given if name not in defaults], base.get_config())
    for name, default in defaults.items():
        if name not in given:
            raise InputError(f"{name} is missing; configs/base.py has it")
        value = given[name]
        if value is None:
            raise InputError(f"{name}=None must have a value, such as that in configs/base.py")
        kinds = {float: (float, int), tuple: (tuple, list)}.get(type(default), (type(default),))
        if type(value) not in kinds:
            raise InputError(
                f"{name}={value!r} must be of type {type(default).__name__}, such as {default!r}"
            )


def resolve_mesh(config: Config, devices: int) -> MeshConfig:
    """Works out mesh sizes left at -1 for so many devices, and checks that all are used.

    `model` becomes the largest divisor of `tp_shards` that fits; then the first of `data`, `fsdp`
    that is -1 takes the rest.

    Raises:
      InputError: the sizes do not multiply to the device count, or the batch or D do not divide.
    """
    mesh, train = config.mesh, config.train
    sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "model")}
    remaining, impossible = divmod(devices, math.prod(n for n in sizes.values() if n != -1))
    if not impossible:
        if sizes["model"] == -1:
            sizes["model"] = math.gcd(remaining, config.model.tp_shards)
            remaining //= sizes["model"]
        for axis in ("data", "fsdp"):
            if sizes[axis] == -1:
                sizes[axis], remaining = remaining, 1
    if impossible or remaining != 1:
        written = ", ".join(f"mesh.{axis}={getattr(mesh, axis)}" for axis in sizes)
        raise InputError(
            f"{written} do not use the {devices} devices present; sizes must multiply to"
            f" {devices} (-1 is worked out; mesh.simulated_devices starts more on a CPU)"
        )
    ways = sizes["data"] * sizes["fsdp"] * train.accumulation_steps
    if train.global_batch % ways:
        raise InputError(
            f"train.global_batch={train.global_batch} does not divide over mesh.data"
            f"={sizes['data']} times mesh.fsdp={sizes['fsdp']} times train.accumulation_steps"
            f"={train.accumulation_steps}; it must be a multiple of {ways}:"
            f" {nearest_multiples(train.global_batch, ways)}"
        )
    for field, axes in (("embed_dim", ("model", "fsdp")), ("vocab_size", ("fsdp",))):
        for axis in axes:
            value = getattr(config.model, field)
            if value != -1 and value % sizes[axis]:
                raise InputError(
                    f"model.{field}={value} does not divide over mesh.{axis}={sizes[axis]};"
                    f" the nearest that do: {nearest_multiples(value, sizes[axis])}"
                )
    return dataclasses.replace(mesh, **sizes)


def leaves(section: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no section, under its whole name, in the order of the names."""
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_field_names(names: list[str], config: ConfigDict) -> None:
    """Refuses names such as "model.layer" that are no fields of `config`.

    Raises:
      InputError: naming the field and the nearest that exists.
    """
    known = [name for name, _ in leaves(config)]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise InputError(
                f"config.{name} is not a field; the nearest is config.{nearest}"
                " (configs/base.py has them all)"
            )


def _compute(fields: dict[str, Any], model: Architecture) -> Compute:
    fields["forward_wire_dtype"] = fields["forward_wire_dtype"] or fields["dtype"]
    for field, allowed in (
        ("dtype", DTYPES),
        ("forward_wire_dtype", FORWARD_WIRE_DTYPES),
        ("backward_wire_dtype", BACKWARD_WIRE_DTYPES),
    ):
        one_of(f"compute.{field}", fields[field], allowed)
    at_least("compute.wire_block", fields["wire_block"], 1)
    at_least("compute.batch_parts", fields["batch_parts"], 0)
    one_of("compute.attention", fields["attention"], ATTENTION_KERNELS)
    compute = Compute(**fields)
    if compute.attention == "cudnn" and not cudnn_supports(model, compute):
        raise InputError(
            f"compute.attention=cudnn does not take compute.dtype={compute.dtype} with"
            f" model.head_dim={model.head_dim}; it takes bfloat16, and multiples of 8 up to 128"
        )
    return compute


def check_mesh(mesh: MeshConfig, tp_shards: int) -> None:
    """Refuses sizes that no number of devices makes possible.

    Raises:
      InputError: naming the size and what is allowed.
    """
    for axis in ("data", "fsdp", "model"):
        size = getattr(mesh, axis)
        if size != -1 and size < 1:
            raise InputError(f"mesh.{axis}={size} must be at least 1, or -1 to be worked out")
    if mesh.model != -1 and tp_shards % mesh.model:
        divisors = [m for m in range(1, tp_shards + 1) if tp_shards % m == 0]
        raise InputError(
            f"mesh.model={mesh.model} does not divide model.tp_shards={tp_shards};"
            f" allowed: {', '.join(map(str, divisors))}"
        )
    at_least("mesh.simulated_devices", mesh.simulated_devices, 0, LARGEST_SIMULATED_DEVICES)


def _check_data(data: DataConfig, least_holdout: int = 2) -> None:
    if data.tfds_name and data.files:
        raise InputError(
            f"data.tfds_name={data.tfds_name} and data.files={data.files} are both given; give one"
        )
    for field in ("files", "tfds_data_dir", "tokenizer", "cache_dir"):
        refuse_url(f"data.{field}", getattr(data, field))
    at_least("data.sequence_length", data.sequence_length, 1)
    at_least("data.holdout_every", data.holdout_every, least_holdout)
    one_of("data.encoding_errors", data.encoding_errors, ("strict", "replace", "ignore"))


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    one_of("optimizer.schedule", optimizer.schedule, SCHEDULES)
    above_zero("optimizer.peak_learning_rate", optimizer.peak_learning_rate)
    if not 0 <= optimizer.final_learning_rate <= optimizer.peak_learning_rate:
        raise InputError(
            f"optimizer.final_learning_rate={optimizer.final_learning_rate} is outside"
            f" [0, optimizer.peak_learning_rate={optimizer.peak_learning_rate}]"
        )
    at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    at_least("optimizer.cooldown_steps", optimizer.cooldown_steps, 0)
    at_least("optimizer.decay_steps", optimizer.decay_steps, 1)
    if optimizer.decay_steps <= optimizer.warmup_steps:
        raise InputError(
            f"optimizer.decay_steps={optimizer.decay_steps} (train.steps when -1) must be above"
            f" optimizer.warmup_steps={optimizer.warmup_steps}; --config.optimizer.warmup_steps=-1"
            " warms up for a tenth of them"
        )
    falling = optimizer.decay_steps - optimizer.warmup_steps
    if optimizer.schedule == "wsd" and optimizer.cooldown_steps > falling:
        raise InputError(
            f"optimizer.cooldown_steps={optimizer.cooldown_steps} must be at most {falling}, the"
            " steps of optimizer.decay_steps after optimizer.warmup_steps"
        )
    for field in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, field) <= LARGEST_BELOW_ONE:
            raise InputError(
                f"optimizer.{field}={getattr(optimizer, field)} is outside [0, 1), where"
                f" {LARGEST_BELOW_ONE} is the largest"
            )
    above_zero("optimizer.epsilon", optimizer.epsilon)
    if optimizer.gradient_clip_norm != math.inf:
        above_zero("optimizer.gradient_clip_norm", optimizer.gradient_clip_norm)
    within("optimizer.weight_decay", optimizer.weight_decay, 0)


def _check_train(train: TrainConfig) -> None:
    for field in (
        "steps",
        "global_batch",
        "accumulation_steps",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "checkpoints_to_keep",
    ):
        at_least(f"train.{field}", getattr(train, field), 1)
    for field in ("eval_sequences", "profile_step"):
        if getattr(train, field) != -1:
            at_least(f"train.{field}", getattr(train, field), 1)
    at_least("train.skipped_updates_allowed", train.skipped_updates_allowed, 0)
