"""Sizes that S does not divide, made larger with zeros: the same function, at a cost.

A head whose output weights are zero adds nothing, nor does an MLP column; ids that pad the
vocabulary have logits of −∞ (`model.vocab_padding`).  In training, zero columns stay zero, and so
do heads with a key/value head of their own: of each product in their gradients, one factor is zero.
Only query heads that share a real key/value head come alive.

Axis letters: D residual width, H heads, K key/value heads, h width of a head, F MLP width,
V vocabulary.
"""

import math
from typing import Any

import numpy as np

from caat_jax.config.architecture import Architecture
from caat_jax.huggingface.mapping import Row

# Of each parameter, for one layer, the axis that may be padded.
_AXES = {
    "query": (1, "heads"),  # [D, H, h]
    "key": (1, "kv_heads"),  # [D, K, h]
    "value": (1, "kv_heads"),  # [D, K, h]
    "output": (0, "heads"),  # [H, h, D]
    "gate": (1, "mlp_dim"),  # [D, F]
    "up": (1, "mlp_dim"),  # [D, F]
    "down": (0, "mlp_dim"),  # [F, D]
    "embedding": (0, "vocab_size"),  # [V, D]
    "head": (1, "vocab_size"),  # [D, V]
}


def padded_fields(model: dict[str, Any], tp_shards: int) -> dict[str, Any]:
    """The fields of `config.model` with the smallest sizes that S shards can hold.

    A key/value head keeps its query heads, to which others may be added.  Of the ways to do so, it
    takes the one with the fewest query heads.
    """
    heads, kv_heads = model["heads"], model["kv_heads"]
    ways = []
    for padded_kv in range(kv_heads, _multiple(kv_heads, tp_shards) + 1):
        if padded_kv % tp_shards == 0 or tp_shards % padded_kv == 0:
            unit = tp_shards // math.gcd(tp_shards, padded_kv)
            ways.append((padded_kv * _multiple(heads // kv_heads, unit), padded_kv))
    padded_heads, padded_kv = min(ways)
    vocabulary = _multiple(model["vocab_size"], tp_shards)
    return model | {
        "heads": padded_heads,
        "kv_heads": padded_kv,
        "mlp_dim": _multiple(model["mlp_dim"], tp_shards),
        "vocab_size": vocabulary,
        "vocab_padding": vocabulary - model["vocab_size"],
    }


def real_part(array: np.ndarray, row: Row, real: Architecture, padded: Architecture) -> np.ndarray:
    """What is not padding: a view of a contiguous parameter, or of one layer of it.

    Of heads, the axis H becomes two: key/value heads, and query heads of each.
    """
    name = row.parameter[-1]
    if name not in _AXES:
        return array
    axis, field = _AXES[name]
    before = (slice(None),) * axis
    if field != "heads":
        return array[*before, : getattr(real, field)]
    groups = padded.kv_heads, padded.heads // padded.kv_heads
    grouped = array.reshape(*array.shape[:axis], *groups, *array.shape[axis + 1 :])
    return grouped[*before, : real.kv_heads, : real.heads // real.kv_heads]


def _multiple(size: int, of: int) -> int:
    return math.ceil(size / of) * of
