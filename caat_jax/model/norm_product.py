"""RMSNorm folded behind the matrix product that follows it, with a derivative written by hand.

    RMSNorm(x; γ) @ W = (x @ (γ ⊙ W)) / rms(x)

The root mean square is one number a token, so it commutes with the product, and the normalised
stream is never written to memory.

The product of the private channels does not need the shared ones, so that it can run while they are
being reduced; backward, the gradients of private channels and weights can run while those of the
shared channels are.  The GPU compiler does so by itself.  The TPU compiler needs a barrier forward,
and backward one product of all channels instead of two (docs/communication.md has the schedules).

Axis letters: B batch, T sequence, D residual width, G groups of shards on this device, w common
channels, n columns of a shard group (`partial_sync.py`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from caat_jax.model.partial_sync import Columns, Stream


def norm_and_project(
    stream: Stream,
    columns: Columns,
    *,
    epsilon: float,
    out_dtype: jnp.dtype | None = None,
    for_tpu: bool = False,
) -> jax.Array:
    """RMSNorm of every shard's stream, times that shard's columns: [G, B, T, n].

    Args:
      stream: the residual streams, in the type of the matrix product.
      columns: γ ⊙ W of this device's shards, in the stream's type.
      epsilon: added to the mean square.
      out_dtype: of the result; the stream's type by default.
      for_tpu: whether products are arranged for the TPU compiler.
    """
    out_dtype = stream.common.dtype if out_dtype is None else out_dtype
    if stream.private.shape[-1]:
        return _split_product(stream, columns, epsilon, out_dtype, for_tpu)
    return _whole_product(stream.common, columns.common, epsilon, out_dtype)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _whole_product(
    x_BTD: jax.Array, weight_Dn: jax.Array, epsilon: float, out_dtype: jnp.dtype
) -> jax.Array:
    """(x @ W) / rms(x), [B, T, n], where no channel is private."""
    return _whole_product_forward(x_BTD, weight_Dn, epsilon, out_dtype)[0]


def _whole_product_forward(x, weight, epsilon, out_dtype):
    inverse_rms = lax.rsqrt(_square_sum(x) / x.shape[-1] + epsilon)
    product = jnp.matmul(x, weight, preferred_element_type=out_dtype)
    return _times_token(product, inverse_rms), (x, weight, inverse_rms)


def _whole_product_backward(epsilon, out_dtype, residuals, gradient):
    # With r = 1/rms(x) and g = r·gradient @ Wᵀ:  dx = g − r²/D · (x·g) · x.  Autodiff would take
    # the inner product over the n columns instead of D channels, and keep another [B, T, n].
    x, weight, inverse_rms = residuals
    gradient = _times_token(gradient, inverse_rms).astype(x.dtype)
    weight_gradient = jnp.einsum("btd,btn->dn", x, gradient)
    x_gradient = jnp.einsum("btn,dn->btd", gradient, weight)
    inner = jnp.sum(x.astype(jnp.float32) * x_gradient, axis=-1)
    correction = _times_token(x, jnp.square(inverse_rms) * inner / x.shape[-1])
    return x_gradient - correction, weight_gradient


_whole_product.defvjp(_whole_product_forward, _whole_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _split_product(
    stream: Stream, columns: Columns, epsilon: float, out_dtype: jnp.dtype, for_tpu: bool
) -> jax.Array:
    """(x @ W) / rms(x), [G, B, T, n]: common and private channels apart."""
    return _split_product_forward(stream, columns, epsilon, out_dtype, for_tpu)[0]


def _split_product_forward(stream, columns, epsilon, out_dtype, for_tpu):
    common, private = stream

    def of_private():
        equation = "gbtd,gdn->gbtn"
        return jnp.einsum(equation, private, columns.private, preferred_element_type=out_dtype)

    def of_common(common):
        # The product is transposed, not the matrix, as one `einsum` would have it: in decode, which
        # multiplies one token of each sequence, the matrix is the larger array by far.
        product = jnp.matmul(common, columns.common, preferred_element_type=out_dtype)
        return jnp.moveaxis(product.reshape(*product.shape[:-1], len(private), -1), -2, 0)

    if not common.shape[-1]:
        product = of_private()
    elif for_tpu:  # nothing needs the common channels, which are being reduced, before
        product, common = lax.optimization_barrier((of_private(), common))
        product += of_common(common)
    else:  # in this order decode on one CPU takes a tenth less than in the other
        product = of_common(common) + of_private()
    width = common.shape[-1] + private.shape[-1]
    square_sum = _square_sum(private) + _square_sum(common)
    inverse_rms = lax.rsqrt(square_sum / width + epsilon)
    result = _times_token(product, inverse_rms)
    return result, (stream, columns, inverse_rms, result)


def _split_product_backward(epsilon, out_dtype, for_tpu, residuals, gradient):
    # The inner product x·g of `_whole_product_backward` is that of gradient and result, so that no
    # gradient of a stream waits for that of the other channels.
    (common, private), columns, inverse_rms, result = residuals
    width = common.shape[-1] + private.shape[-1]
    inner = jnp.sum(gradient.astype(jnp.float32) * result, axis=-1)
    factor_GBT = jnp.square(inverse_rms) * inner / width
    gradient = _times_token(gradient, inverse_rms).astype(common.dtype)
    products = _joined_gradients if for_tpu and len(private) == 1 else _split_gradients
    stream_gradient, columns_gradient = products(Stream(common, private), columns, gradient)
    correction = Stream(
        _times_token(common, jnp.sum(factor_GBT, axis=0)), _times_token(private, factor_GBT)
    )
    return jax.tree.map(jnp.subtract, stream_gradient, correction), columns_gradient


def _split_gradients(stream, columns, gradient_GBTn):
    """Of x @ W: gradients of x and W."""
    common, private = stream
    groups, _, n = columns.private.shape
    common_columns = columns.common.reshape(len(columns.common), groups, n)
    # The gradient is the first operand: XLA for CPUs transposes another array then than otherwise,
    # which would make a training step at G = 8 an eighth longer.
    stream_gradient = Stream(
        jnp.einsum("gbtn,dgn->btd", gradient_GBTn, common_columns),
        jnp.einsum("gbtn,gdn->gbtd", gradient_GBTn, columns.private),
    )
    of_common = jnp.einsum("gbtn,btd->gnd", gradient_GBTn, common)
    of_private = jnp.einsum("gbtn,gbtd->gnd", gradient_GBTn, private)
    columns_gradient = Columns(
        jnp.moveaxis(of_common, -1, 0).reshape(columns.common.shape),
        jnp.swapaxes(of_private, 1, 2),
    )
    return stream_gradient, columns_gradient


def _joined_gradients(stream, columns, gradient_GBTn):
    """The same of one group, by one product each."""
    width = stream.common.shape[-1]
    x_BTD = jnp.concatenate([stream.common, stream.private[0]], axis=-1)
    weight_Dn = jnp.concatenate([columns.common, columns.private[0]])
    x_gradient = jnp.einsum("btn,dn->btd", gradient_GBTn[0], weight_Dn)
    weight_gradient = jnp.einsum("btd,btn->dn", x_BTD, gradient_GBTn[0])
    return (
        Stream(x_gradient[..., :width], x_gradient[None, ..., width:]),
        Columns(weight_gradient[:width], weight_gradient[None, width:]),
    )


_split_product.defvjp(_split_product_forward, _split_product_backward)


def _square_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)


def _times_token(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x [..., T, n] times one float32 number a token [..., T], in x's type."""
    return (x * factor[..., None]).astype(x.dtype)
