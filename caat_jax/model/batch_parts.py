"""A device's sequences in parts: one part computes while another's channels are reduced.

Beside a sublayer's reduction its own sequences have little to compute: the next projection of
their private channels, at p = 1 nothing at all.  Other sequences need nothing of it.  So each
sublayer is applied to every part in turn, each with a reduction of its own, which the compiler can
run beside the next part's products (as Domino does with two parts, arXiv:2409.15241).  The function
and the bytes are the same; the gradient of a weight is the sum over the parts.
"""

import jax.numpy as jnp
from jax import lax

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Compute
from caat_jax.model.partial_sync import Stream


def choose(arch: Architecture, compute: Compute, platform: str, *, offloaded: bool = False) -> int:
    """The number of parts for `compute.batch_parts` on devices of this platform.

    0 chooses by the compiled schedules in docs/communication.md: two parts hide more on GPUs
    always, on TPUs where reductions are offloaded (`xla_options`) or no channel is private.
    """
    if compute.batch_parts:
        return compute.batch_parts
    if offloaded or platform == "gpu":
        return 2
    whole = all(width == arch.embed_dim for pair in arch.sync_widths for width in pair)
    return 2 if platform == "tpu" and whole else 1


def split(stream: Stream, parts: int) -> tuple[Stream, ...]:
    """The streams of each part's sequences.

    They are one part where they do not divide into as many, or where nothing is sent (M = 1).
    """
    if stream.common.shape[0] % parts or lax.axis_size("model") == 1:
        parts = 1
    common, private = jnp.split(stream.common, parts), jnp.split(stream.private, parts, axis=1)
    return tuple(map(Stream, common, private))


def join(parts: tuple[Stream, ...]) -> Stream:
    """The inverse of `split`."""
    common, private = zip(*parts, strict=True)
    return Stream(jnp.concatenate(common), jnp.concatenate(private, axis=1))
