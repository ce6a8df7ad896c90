"""From an `ml_collections` ConfigDict to frozen dataclasses; every field is checked.

`configs/base.py` holds each field's default and meaning; the dataclasses repeat neither.
`architecture.py` has `config.model`, `field_checks.py` what a single number or word may be.
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

from caat_jax.architecture import (
    Architecture,
    Stage,
    SyncFactors,
    checked_architecture,
    checked_schedule,
)
from caat_jax.errors import InputError
from caat_jax.field_checks import (
    LARGEST_BELOW_ONE,
    above_zero,
    at_least,
    nearest_multiples,
    one_of,
    within,
)

DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "plain", "splash", "cudnn")
# More would take hours to start.
LARGEST_SIMULATED_DEVICES = 1024


@dataclasses.dataclass(frozen=True)
class Compute:
    """`config.compute`; the wire dtypes are never empty."""

    dtype: str
    forward_wire_dtype: str
    backward_wire_dtype: str
    remat: bool
    scan_layers: bool
    attention: str


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """`config.mesh`; sizes may be -1 until `resolve_mesh`."""

    data: int
    fsdp: int
    model: int
    simulated_devices: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`."""

    tfds_name: str
    files: str
    tfds_data_dir: str
    text_feature: str
    train_split: str
    eval_split: str
    holdout_every: int
    encoding_errors: str
    tokenizer: str
    cache_dir: str
    sequence_length: int


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`config.optimizer`, `decay_steps` worked out."""

    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    decay_steps: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    gradient_clip_norm: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`."""

    steps: int
    global_batch: int
    accumulation_steps: int
    log_every: int
    eval_every: int
    eval_sequences: int
    checkpoint_every: int
    checkpoints_to_keep: int
    skipped_updates_allowed: int
    profile_step: int
    sync_schedule: tuple[Stage, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration, checked."""

    seed: int
    model: Architecture
    compute: Compute
    mesh: MeshConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig

    def at_step(self, step: int) -> "Config":
        """The configuration as far as that step: what its checkpoint carries.

        Its model has the factors in effect for training step `step` and the state after it (0: the
        state before the first); its schedule has the stages that were over by then.
        """
        schedule = self.train.sync_schedule
        over = tuple(stage for stage in schedule if stage.until < step)
        model = self.model
        if len(over) < len(schedule):
            model = dataclasses.replace(model, sync_factors=schedule[len(over)].sync_factors)
        return dataclasses.replace(
            self,
            model=model,
            train=dataclasses.replace(self.train, sync_schedule=over),
        )

    def with_sync_factor(self, p: float) -> "Config":
        """The same configuration with this synchronisation factor in every sublayer."""
        return self.with_sync_factors(((p, p),) * self.model.layers)

    def with_sync_factors(self, factors: tuple[tuple[float, float], ...]) -> "Config":
        """The same configuration with these as `model.sync_factors`."""
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, sync_factors=factors)
        )

    def with_vocabulary(self, tokenizer_size: int) -> "Config":
        """Fills in or checks `model.vocab_size` against a tokeniser of that many ids."""
        model = self.model
        multiple = math.ceil(tokenizer_size / model.tp_shards) * model.tp_shards
        if model.vocab_size == -1:
            return dataclasses.replace(self, model=dataclasses.replace(model, vocab_size=multiple))
        if tokenizer_size > model.vocab_size:
            raise InputError(
                f"data.tokenizer={self.data.tokenizer} has {tokenizer_size} ids, more than"
                f" model.vocab_size={model.vocab_size}; use model.vocab_size={multiple} or more,"
                " or -1 to let it be worked out"
            )
        return self


def resolve(config: ConfigDict) -> Config:
    """Checks every field on its own and against its neighbours.

    Raises:
      InputError: naming the field, its value and what is allowed.
    """
    for name, value in leaves(config):
        # What a ConfigDict lets a file put into a field of any type.
        if value is None:
            raise InputError(f"{name}=None must have a value, such as that in configs/base.py")
    model = checked_architecture(dict(config.model))
    schedule = checked_schedule(config.train.sync_schedule, model.layers)
    train = TrainConfig(**{**config.train, "sync_schedule": schedule})
    _check_train(train)
    optimizer = dict(config.optimizer)
    if optimizer["decay_steps"] == -1:
        optimizer["decay_steps"] = train.steps
    optimizer = OptimizerConfig(**optimizer)
    _check_optimizer(optimizer)
    data = DataConfig(**config.data)
    _check_data(data)
    at_least("seed", config.seed, 0)
    mesh = MeshConfig(**config.mesh)
    _check_mesh(mesh, model.tp_shards)
    return Config(
        seed=config.seed,
        model=model,
        compute=_compute(dict(config.compute), model),
        mesh=mesh,
        data=data,
        optimizer=optimizer,
        train=train,
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


def fields(config: Config) -> dict[str, Any]:
    """Of `configs/base.py`, those of which `resolve` makes this configuration, by section.

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
    """The fields of two `Config`, or of one section of two, that differ: `NAME: stored, given`."""
    differing = []
    for field in dataclasses.fields(stored):
        name = section + field.name
        there, asked = getattr(stored, field.name), getattr(given, field.name)
        if dataclasses.is_dataclass(there):
            differing += difference(there, asked, f"{name}.")
        elif there != asked:
            if field.name == "sync_factors":
                there, asked = stored.describe_sync_factors(), given.describe_sync_factors()
            differing.append(f"{name}: {there} there, {asked} asked for")
    return differing


def cudnn_takes(model: Architecture, compute: Compute) -> bool:
    """Whether cuDNN's flash attention does this type and head width, on all GPUs that have it."""
    return compute.dtype == "bfloat16" and model.head_dim % 8 == 0 and model.head_dim <= 128


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
    for field in ("dtype", "forward_wire_dtype", "backward_wire_dtype"):
        one_of(f"compute.{field}", fields[field], DTYPES)
    one_of("compute.attention", fields["attention"], ATTENTION)
    compute = Compute(**fields)
    if compute.attention == "cudnn" and not cudnn_takes(model, compute):
        raise InputError(
            f"compute.attention=cudnn does not take compute.dtype={compute.dtype} with"
            f" model.head_dim={model.head_dim}; it takes bfloat16, and multiples of 8 up to 128"
        )
    return compute


def _check_mesh(mesh: MeshConfig, tp_shards: int) -> None:
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


def _check_data(data: DataConfig) -> None:
    if data.tfds_name and data.files:
        raise InputError(
            f"data.tfds_name={data.tfds_name} and data.files={data.files} are both given; give one"
        )
    at_least("data.sequence_length", data.sequence_length, 1)
    at_least("data.holdout_every", data.holdout_every, 2)
    one_of("data.encoding_errors", data.encoding_errors, ("strict", "replace", "ignore"))


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    above_zero("optimizer.peak_learning_rate", optimizer.peak_learning_rate)
    if not 0 <= optimizer.final_learning_rate <= optimizer.peak_learning_rate:
        raise InputError(
            f"optimizer.final_learning_rate={optimizer.final_learning_rate} is outside"
            f" [0, optimizer.peak_learning_rate={optimizer.peak_learning_rate}]"
        )
    at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    at_least("optimizer.decay_steps", optimizer.decay_steps, 1)
    if optimizer.decay_steps <= optimizer.warmup_steps:
        raise InputError(
            f"optimizer.decay_steps={optimizer.decay_steps} (train.steps when -1) must be above"
            f" optimizer.warmup_steps={optimizer.warmup_steps}"
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
