"""Losses over a vocabulary that is split over the `model` mesh axis."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def cross_entropy(logits_GBTv: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """−log softmax(logits)[target] of every token, in nats; 0 where the target is negative.

    Runs inside `jax.shard_map`; no device sees the logits of another: only one number a token is
    reduced by maximum and two by sum.

    Args:
      logits_GBTv: float32 [G, B, T, v], this device's part of the vocabulary in G groups.
      targets_BT: int32 [B, T], the ids of the next tokens; negative ones are not counted.

    Returns:
      float32 [B, T], equal on all devices of the `model` axis.
    """
    return _forward(logits_GBTv, targets_BT)[0]


def most_likely(logits_GBTv: jax.Array) -> jax.Array:
    """The id with the largest logit of the whole vocabulary, the lowest of equals.

    Runs inside `jax.shard_map`; every device sends two numbers a token, in one collective.

    Args:
      logits_GBTv: float32 [G, B, T, v], as for `cross_entropy`.

    Returns:
      int32 [B, T], equal on all devices of the `model` axis.
    """
    largest = jnp.max(logits_GBTv, axis=(0, -1))
    no_id = jnp.iinfo(jnp.int32).max
    ids = jnp.where(logits_GBTv == largest[..., None], vocabulary_ids(logits_GBTv), no_id)
    own = lax.bitcast_convert_type(largest, jnp.int32), jnp.min(ids, axis=(0, -1))
    each_M2BT = lax.all_gather(jnp.stack(own), "model", to="invarying")
    largest = lax.bitcast_convert_type(each_M2BT[:, 0], jnp.float32)
    ids = jnp.where(largest == jnp.max(largest, axis=0), each_M2BT[:, 1], no_id)
    return jnp.min(ids, axis=0)


def without_padding(logits_GBTv: jax.Array, padding: int) -> jax.Array:
    """The logits, −∞ for the last `padding` ids of the whole vocabulary; inside `jax.shard_map`."""
    if not padding:
        return logits_GBTv
    groups, columns = logits_GBTv.shape[0], logits_GBTv.shape[-1]
    vocabulary = lax.axis_size("model") * groups * columns
    is_real = vocabulary_ids(logits_GBTv) < vocabulary - padding
    return jnp.where(is_real, logits_GBTv, -jnp.inf)


@jax.custom_vjp
def divergence(logits_GBTv: jax.Array, teacher_GBTv: jax.Array) -> jax.Array:
    """KL(teacher || model) = Σ_v q_v·(log q_v − log p_v) of every token, in nats.

    p = softmax(logits), q = softmax(teacher).  Runs inside `jax.shard_map`; as in `cross_entropy`,
    a few numbers a token are reduced.  There is no gradient for the teacher.

    Args:
      logits_GBTv: float32 [G, B, T, v], the model's, as for `cross_entropy`.
      teacher_GBTv: float32, the same ids, perhaps in other groups; −∞ where the model's are.

    Returns:
      float32 [B, T], equal on all devices of the `model` axis.
    """
    return _divergence_forward(logits_GBTv, teacher_GBTv)[0]


def in_groups(logits_GBTv: jax.Array, groups: int) -> jax.Array:
    """The same ids' logits in another number of groups."""
    if logits_GBTv.shape[0] == groups:
        return logits_GBTv
    logits_BTGv = jnp.moveaxis(logits_GBTv, 0, 2)
    return jnp.moveaxis(logits_BTGv.reshape(*logits_BTGv.shape[:2], groups, -1), 2, 0)


def _divergence_forward(logits, teacher):
    teacher = in_groups(teacher, logits.shape[0])
    both = jnp.stack([logits, teacher])
    largest = lax.pmax(jnp.max(both, axis=(1, -1)), "model")
    exponentials = jnp.exp(both - largest[:, None, ..., None])
    # An id of no probability counts nothing, though its logits' difference is no number.
    farther = jnp.where(exponentials[1] > 0, exponentials[1] * (teacher - logits), 0.0)
    sums = jnp.sum(jnp.concatenate([exponentials, farther[None]]), axis=(1, -1))
    model_sum, teacher_sum, farther_sum = lax.psum(sums, "model")
    normalisers = largest + jnp.log(jnp.stack([model_sum, teacher_sum]))
    losses = farther_sum / teacher_sum + normalisers[0] - normalisers[1]
    return losses, (logits, teacher, normalisers)


def _divergence_backward(residuals, gradient):
    logits, teacher, normalisers = residuals
    model, teacher = (
        jnp.exp(part - normaliser[..., None])
        for part, normaliser in zip((logits, teacher), normalisers, strict=True)
    )
    return gradient[..., None] * (model - teacher), None


divergence.defvjp(_divergence_forward, _divergence_backward)


def _forward(logits, targets):
    largest = lax.pmax(jnp.max(logits, axis=(0, -1)), "model")
    exponentials = jnp.sum(jnp.exp(logits - largest[..., None]), axis=(0, -1))
    target_logit = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=(0, -1))
    sums = lax.psum(jnp.stack([exponentials, target_logit]), "model")  # at once: both are small
    exponentials, target_logit = sums
    log_normaliser = largest + jnp.log(exponentials)
    losses = jnp.where(targets >= 0, log_normaliser - target_logit, 0.0)
    return losses, (logits, targets, log_normaliser)


def _backward(residuals, gradient):
    # d loss / d logit = softmax − one-hot: recomputed from the logits in one pass.
    logits, targets, log_normaliser = residuals
    gradient = jnp.where(targets >= 0, gradient, 0.0)[..., None]
    softmax = jnp.exp(logits - log_normaliser[..., None])
    return gradient * (softmax - _is_target(logits, targets)), None


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return vocabulary_ids(logits) == targets[..., None]


def vocabulary_ids(logits: jax.Array) -> jax.Array:
    """int32 [G, 1, …, v]: the id that each column of this device's logits [G, …, v] belongs to."""
    groups, columns = logits.shape[0], logits.shape[-1]
    first = lax.axis_index("model") * groups * columns
    ids = first + jnp.arange(groups)[:, None] * columns + jnp.arange(columns)
    return jnp.expand_dims(ids, range(1, logits.ndim - 1))


cross_entropy.defvjp(_forward, _backward)
