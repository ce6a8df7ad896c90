"""What the function is: sizes, shards and synchronisation factors; `config.model` and its checks.

`configs/base.py` holds each field's default and meaning.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from caat_jax.config.field_checks import (
    LARGEST_INTEGER,
    above_zero,
    at_least,
    nearest_multiples,
    within,
)
from caat_jax.errors import InputError

# More would take hours to check.
LARGEST_LAYERS = 10_000

# Of every layer, (attention, MLP).
SyncFactors = tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the function is: `config.model` with nothing left at -1 but, at first, `vocab_size`.

    `sync_factors[l]` is the pair (attention, MLP) of layer l's synchronisation factors.
    """

    layers: int
    embed_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    vocab_padding: int
    tied_head: bool
    rope_base: float
    rope_scaling_factor: float
    rope_scaling_low_turns: float
    rope_scaling_high_turns: float
    rope_scaling_original_length: int
    norm_epsilon: float
    tp_shards: int
    sync_factors: SyncFactors

    @property
    def computed_kv_heads(self) -> int:
        """Key/value heads that all shards compute together.

        With fewer heads than shards, S/K consecutive shards share one, and each computes its keys
        and values from its own stream.
        """
        return max(self.kv_heads, self.tp_shards)

    def sync_width(self, p: float) -> int:
        """D_s of a sublayer with this factor."""
        return int(self.embed_dim * p)

    @property
    def sync_widths(self) -> tuple[tuple[int, int], ...]:
        """D_s of every layer's (attention, MLP)."""
        return tuple(tuple(map(self.sync_width, pair)) for pair in self.sync_factors)

    @property
    def is_dense(self) -> bool:
        """Whether the function is an ordinary Llama's: nothing private, or one shard only."""
        widths = {width for pair in self.sync_widths for width in pair}
        return self.tp_shards == 1 or widths == {self.embed_dim}

    def describe_sync_factors(self) -> str:
        """For people: "0.5", or runs of layers as in "1.0 in 2 layers, 0.5 in 30 layers"."""
        runs = [
            (str(pair if pair[0] != pair[1] else pair[0]), len(list(layers)))
            for pair, layers in itertools.groupby(self.sync_factors)
        ]
        if len(runs) == 1:
            return runs[0][0]
        return ", ".join(f"{factors} in {n} layer{'s' * (n > 1)}" for factors, n in runs)


class Stage(NamedTuple):
    """The synchronisation factors up to and including a step, instead of the model's own."""

    until: int
    sync_factors: SyncFactors


def checked_architecture(model: dict[str, Any]) -> Architecture:
    """Of the fields of `config.model`.

    Raises:
      InputError: naming the field, its value and what is allowed.
    """
    at_least("model.layers", model["layers"], 1, LARGEST_LAYERS)
    for field in ("embed_dim", "heads", "kv_heads", "mlp_dim", "tp_shards"):
        at_least(f"model.{field}", model[field], 1)
    shards = model["tp_shards"]
    for field in ("heads", "kv_heads", "mlp_dim", "vocab_size"):
        value = model[field]
        if field == "vocab_size" and value == -1:
            continue
        at_least(f"model.{field}", value, 1)
        if field == "kv_heads" and shards % value == 0:  # S/K shards share each
            continue
        if value % shards:
            hint = {
                "vocab_size": ", or pad the vocabulary with model.vocab_size=-1",
                "kv_heads": ", or a divisor of model.tp_shards, which shards share",
            }.get(field, "")
            raise InputError(
                f"model.{field}={value} does not divide over model.tp_shards={shards};"
                f" the nearest that do: {nearest_multiples(value, shards)}{hint}"
            )
    at_least("model.vocab_padding", model["vocab_padding"], 0, max(model["vocab_size"] - 1, 0))
    if model["heads"] % model["kv_heads"]:
        raise InputError(
            f"model.kv_heads={model['kv_heads']} does not divide model.heads={model['heads']}"
        )
    if model["head_dim"] == -1:
        if model["embed_dim"] % model["heads"]:
            raise InputError(
                f"model.embed_dim={model['embed_dim']} does not divide over model.heads"
                f"={model['heads']}: give model.head_dim, or an embed_dim of"
                f" {nearest_multiples(model['embed_dim'], model['heads'])}"
            )
        model["head_dim"] = model["embed_dim"] // model["heads"]
    if not 2 <= model["head_dim"] <= LARGEST_INTEGER or model["head_dim"] % 2:
        raise InputError(
            f"model.head_dim={model['head_dim']}: rotary embedding needs an even number, of"
            f" {LARGEST_INTEGER} at most"
        )
    for field in ("rope_base", "rope_scaling_low_turns", "norm_epsilon"):
        above_zero(f"model.{field}", model[field])
    _check_rope_scaling(model)
    factor, per_layer = model.pop("sync_factor"), model.pop("sync_factor_per_layer")
    if per_layer:
        factors = checked_sync_factors("model.sync_factor_per_layer", per_layer, model["layers"])
    else:
        factors = checked_sync_factors("model.sync_factor", factor, model["layers"])
    return Architecture(**model, sync_factors=factors)


def _check_rope_scaling(model: dict[str, Any]) -> None:
    within("model.rope_scaling_factor", model["rope_scaling_factor"], 1)
    if not model["rope_scaling_high_turns"] > model["rope_scaling_low_turns"]:
        raise InputError(
            f"model.rope_scaling_high_turns={model['rope_scaling_high_turns']} must be above"
            f" model.rope_scaling_low_turns={model['rope_scaling_low_turns']}"
        )
    at_least("model.rope_scaling_original_length", model["rope_scaling_original_length"], 1)


def checked_schedule(stages: Sequence, layers: int) -> tuple[Stage, ...]:
    """Of `train.sync_schedule`: pairs of a last step and a factor, or an entry for each layer.

    Raises:
      InputError: naming what is wrong with which stage.
    """
    name, resolved = "train.sync_schedule", []
    for stage in stages:
        if not isinstance(stage, (tuple, list)) or len(stage) != 2 or type(stage[0]) is not int:
            raise InputError(
                f"{name}: {stage!r} must be a pair (last step, factor) with a whole step, as in"
                " ((500, 1.0),)"
            )
        until, factor = stage
        at_least(f"{name}: last step", until, resolved[-1].until + 1 if resolved else 0)
        factors = checked_sync_factors(f"{name} (to step {until})", factor, layers)
        resolved.append(Stage(until, factors))
    return tuple(resolved)


def checked_sync_factors(name: str, given: float | Sequence, layers: int) -> SyncFactors:
    """Of one factor for every sublayer, or of an entry for each layer."""
    entries = tuple(given) if isinstance(given, (tuple, list)) else (given,) * layers
    if len(entries) != layers:
        raise InputError(
            f"{name} has {len(entries)} entries; it must have one for each of the"
            f" model.layers={layers}"
        )
    pairs = []
    for entry in entries:
        pair = tuple(entry) if isinstance(entry, (tuple, list)) else (entry, entry)
        if len(pair) != 2 or not all(isinstance(p, (int, float)) for p in pair):
            raise InputError(
                f"{name}: {entry!r} must be a number or a pair of numbers (attention, MLP)"
            )
        for p in pair:
            if not 0 <= p <= 1:
                raise InputError(f"{name}={p} is outside [0, 1]")
        pairs.append((float(pair[0]), float(pair[1])))
    return tuple(pairs)
