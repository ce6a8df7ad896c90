"""The Llama that `caat_jax` is at p = 1, written plainly for one device: the baseline.

No shards, no `shard_map`, no stacked layers: RMSNorm then matrix product, einsum attention under a
causal mask, log-softmax cross-entropy, a Python loop over a list of layers.

Axis letters: B batch, T position of the query, U position of the key, D residual width, H heads,
h width of a head, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def from_stacked(parameters: dict[str, Any]) -> dict[str, Any]:
    """`caat_jax`'s parameters, with the stacked layers as a list."""
    stacked = parameters["layers"]
    layers = len(stacked["attention"]["norm"])
    return {
        **parameters,
        "layers": [jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(layers)],
    }


def make_train_step(
    optimizer: optax.GradientTransformation, dtype: str = "float32", **settings: Any
) -> Callable:
    """Compiled (parameters, optimizer state, tokens [B, T + 1]) -> (both updated, loss).

    Args:
      optimizer: an Optax optimizer.
      dtype: of activations and products.
      settings: keyword arguments of `forward`.
    """

    def loss(parameters: dict[str, Any], tokens: jax.Array) -> jax.Array:
        parameters = jax.tree.map(lambda w: w.astype(dtype), parameters)
        logits_BTV = forward(parameters, tokens[:, :-1], **settings)
        log_probabilities = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))

    def train_step(parameters, optimizer_state, tokens):
        value, gradients = jax.value_and_grad(loss)(parameters, tokens)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), optimizer_state, value

    return jax.jit(train_step, donate_argnums=(0, 1))


def forward(
    parameters: dict[str, Any],
    tokens_BT: jax.Array,
    *,
    rope_base: float,
    norm_epsilon: float,
    constrain: Callable[[jax.Array], jax.Array] = lambda x_BTD: x_BTD,
    last_only: bool = False,
) -> jax.Array:
    """Logits [B, T, V].

    Args:
      parameters: as `from_stacked` returns them.
      tokens_BT: token ids.
      rope_base: base of the rotary embedding.
      norm_epsilon: epsilon of RMSNorm.
      constrain: applied to the residual stream after every sublayer, for runs on a mesh.
      last_only: return the logits of the last position only, [B, 1, V].
    """
    x_BTD = constrain(parameters["embedding"][tokens_BT])
    for layer in parameters["layers"]:
        attention, mlp = layer["attention"], layer["mlp"]
        h_BTD = _rms_norm(x_BTD, attention["norm"], norm_epsilon)
        x_BTD = constrain(x_BTD + _attention(h_BTD, attention, rope_base))
        h_BTD = _rms_norm(x_BTD, mlp["norm"], norm_epsilon)
        h_BTD = (jax.nn.silu(h_BTD @ mlp["gate"]) * (h_BTD @ mlp["up"])) @ mlp["down"]
        x_BTD = constrain(x_BTD + h_BTD)
    if last_only:
        x_BTD = x_BTD[:, -1:]
    return _rms_norm(x_BTD, parameters["final_norm"], norm_epsilon) @ parameters["head"]


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def _attention(x_BTD: jax.Array, weights: dict[str, jax.Array], rope_base: float) -> jax.Array:
    query, key, value = (
        jnp.einsum("BTD,DHh->BTHh", x_BTD, weights[name]) for name in ("query", "key", "value")
    )
    query, key = _rotate(query, rope_base), _rotate(key, rope_base)
    length = x_BTD.shape[1]
    scores = jnp.einsum("BTHh,BUHh->BHTU", query, key) / math.sqrt(query.shape[-1])
    scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
    attended = jnp.einsum("BHTU,BUHh->BTHh", jax.nn.softmax(scores), value)
    return jnp.einsum("BTHh,HhD->BTD", attended, weights["output"])


def _rotate(x_BTHh: jax.Array, base: float) -> jax.Array:
    length, width = x_BTHh.shape[1], x_BTHh.shape[3]
    angles = np.arange(length)[:, None, None] * base ** (-np.arange(0, width, 2) / width)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = jnp.split(x_BTHh, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
