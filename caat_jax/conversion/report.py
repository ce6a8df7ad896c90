"""A conversion's table, for people and as CSV, and the estimate of its memory."""

from typing import Any

import jax

from caat_jax.config.architecture import Architecture
from caat_jax.conversion.converting import Converted
from caat_jax.conversion.texts import Texts


def table(converted: Converted) -> str:
    """The streams' errors after each sublayer, and the losses."""
    lines = ["layer  sublayer   distance from the dense stream: cut    fitted"]
    lines += [
        f"{layer:5}  {kind:9}  {error.cut:35.4f}  {error.fitted:8.4f}"
        for (layer, kind), error in converted.errors.items()
    ]
    losses = (
        ("dense", converted.dense_loss),
        ("plain cut", converted.cut_loss),
        ("converted", converted.loss),
    )
    lines += ["", f"loss on held-out text, nats a token ({converted.held_out_tokens:,} tokens)"]
    lines += [f"{name:9}  {loss:8.4f}  {loss - losses[0][1]:+8.4f}" for name, loss in losses]
    return "\n".join(lines)


def to_csv(converted: Converted) -> str:
    """A row for each sublayer."""
    rows = [
        f"{layer},{kind},{error.cut!r},{error.fitted!r}"
        for (layer, kind), error in converted.errors.items()
    ]
    return "\n".join(["layer,sublayer,error_cut,error_fitted", *rows, ""])


def to_json(converted: Converted, texts: Texts, arch: Architecture) -> dict[str, object]:
    """JSON-able: the losses and what they are of."""
    return {
        "tp_shards": arch.tp_shards,
        "sync_factors": arch.sync_factors,
        "calibration_tokens": texts.tokens,
        "held_out_tokens": converted.held_out_tokens,
        "dense_loss": converted.dense_loss,
        "cut_loss": converted.cut_loss,
        "loss": converted.loss,
    }


def memory(arch: Architecture, texts: Texts, devices: int, parameters: Any) -> str:
    """One line for people: what a conversion takes, all in float32.

    Args:
      arch: what the model becomes.
      texts: to calibrate on.
      devices: those that the shards are split over.
      parameters: of the model.
    """
    S, D, F = arch.tp_shards, arch.embed_dim, arch.mlp_dim
    k = max(F, arch.heads * arch.head_dim) // S
    batch = texts.calibration[0].size
    # Weights twice; input moments, then output moments; a batch's streams, activations, products.
    weights = 2 * 3 * D * F
    moments = max(2 * S * D * D, S * k * (S * k + D))
    streams = (S + 2) * D
    on_device = (weights + moments + batch * (2 * streams + 4 * S * k)) / devices
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    on_host = size + texts.tokens * (streams + S * k)
    return (
        f"{texts.tokens:,} calibration tokens take about {4e-9 * on_device:.2f} GB on each device"
        f" and {4e-9 * on_host:.2f} GB of the host; the losses, the whole model on the devices"
    )
