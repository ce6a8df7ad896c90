"""The configuration as frozen dataclasses, one for each section of `configs/base.py`.

`configs/base.py` holds each field's default and meaning; the dataclasses repeat neither.
`architecture.py` has `config.model`; `resolve.py` makes a `Config` of an `ml_collections` one.
"""

import dataclasses
import math

from caat_jax.config.architecture import Architecture, Stage
from caat_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Compute:
    """`config.compute`; the wire dtypes are never empty."""

    dtype: str
    forward_wire_dtype: str
    backward_wire_dtype: str
    wire_block: int
    emulate_wires: bool
    remat: bool
    scan_layers: bool
    batch_parts: int
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
    own_text: bool
    cache_dir: str
    sequence_length: int

    def describe(self) -> str:
        """The corpus and the tokeniser, for people."""
        corpus = self.tfds_name or self.files or "the source of Python's standard library"
        return f"{corpus}, tokeniser {self.tokenizer}"

    def check_own_text(self, names_tokenizer: bool = True) -> None:
        """Refuses the default corpus, and the default tokeniser, where `own_text` does.

        Args:
          names_tokenizer: whether `tokenizer` will be used.
        """
        missing = []
        if not (self.tfds_name or self.files):
            missing.append("data.files or data.tfds_name")
        if names_tokenizer and self.tokenizer == "bytes":
            missing.append("data.tokenizer")
        if self.own_text and missing:
            raise InputError(
                f"{' and '.join(missing)} missing, and this configuration has data.own_text=True:"
                ' give text, such as --config.data.files="~/books/**/*.txt", and'
                " --config.data.tokenizer=tokenizer.model; or --config.data.own_text=False for"
                f" {self.describe()}"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """`config.optimizer`, the numbers of steps worked out."""

    schedule: str
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    cooldown_steps: int
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
    teacher: str


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
        ids = tokenizer_size + model.vocab_padding
        multiple = math.ceil(ids / model.tp_shards) * model.tp_shards
        if model.vocab_size == -1:
            return dataclasses.replace(self, model=dataclasses.replace(model, vocab_size=multiple))
        if ids > model.vocab_size:
            padding = f" - model.vocab_padding={model.vocab_padding}" * bool(model.vocab_padding)
            raise InputError(
                f"data.tokenizer={self.data.tokenizer} has {tokenizer_size} ids, more than"
                f" model.vocab_size={model.vocab_size}{padding}; use model.vocab_size={multiple} or"
                " more, or -1 to let it be worked out"
            )
        return self


def cudnn_supports(model: Architecture, compute: Compute) -> bool:
    """Whether cuDNN's flash attention does this type and head width, on all GPUs that have it."""
    return compute.dtype == "bfloat16" and model.head_dim % 8 == 0 and model.head_dim <= 128
