"""A dense model's weights become those of a CAAT-Net, without training.

They are written in another basis of the residual stream first, then fitted sublayer by sublayer.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from caat_jax.config.sections import Config
from caat_jax.conversion import basis, fitting
from caat_jax.conversion.fitting import Fitter, StreamError
from caat_jax.conversion.progress import Progress
from caat_jax.conversion.texts import Texts
from caat_jax.devices import sharding
from caat_jax.training.step import Programs
from caat_jax.training.validation import summed_loss

# The stream is turned, which gives a tied head a matrix of its own, or its channels are permuted.
ROTATION, CHANNELS = "rotation", "channels"
BASES = (ROTATION, CHANNELS)

Parameters = dict[str, Any]  # nested dictionaries of NumPy arrays


class Converted(NamedTuple):
    """What a dense model became, and what that costs."""

    parameters: Parameters
    errors: dict[tuple[int, str], StreamError]  # after each sublayer: (layer, kind)
    dense_loss: float  # on the held-out text, in nats a token
    cut_loss: float  # of the dense model's weights with the new factors, neither turned nor fitted
    loss: float
    held_out_tokens: int


def convert(
    parameters: Parameters,
    dense: Config,
    target: Config,
    mesh: Mesh,
    texts: Texts,
    progress: Progress,
    *,
    new_basis: str,
) -> Converted:
    """Fits the target's weights and measures losses.

    Args:
      parameters: the dense model's; changed in place.
      dense: p = 1, with the target's S.
      target: what it becomes; its head is untied where the stream is to be turned.
      mesh: to compute on, whole over `fsdp`.
      texts: to calibrate on, and to measure the losses on.
      progress: of this conversion.
      new_basis: one of `BASES`.
    """
    cut = dataclasses.replace(
        target, model=dataclasses.replace(target.model, tied_head=dense.model.tied_head)
    )
    dense_loss, tokens = loss(dense, mesh, parameters, texts.held_out)
    cut_loss, _ = loss(cut, mesh, parameters, texts.held_out)
    errors = {}
    if not target.model.is_dense:
        basis.fold_norms(parameters)
        change_basis(parameters, dense, mesh, texts, progress, new_basis)
        errors = fit(parameters, dense, target, mesh, texts, progress)
    converted_loss, _ = loss(target, mesh, parameters, texts.held_out)
    return Converted(parameters, errors, dense_loss, cut_loss, converted_loss, tokens)


def loss(
    config: Config, mesh: Mesh, parameters: Parameters, sequences: Sequence[np.ndarray]
) -> tuple[float, int]:
    """Mean cross-entropy in nats a token, and the number of tokens."""
    programs = Programs(config, mesh)
    shardings = sharding.named_shardings(mesh, programs.blueprint.specs)
    total, count = summed_loss(programs, jax.device_put(parameters, shardings), sequences, -1)
    return total / count, count


def change_basis(
    parameters: Parameters,
    dense: Config,
    mesh: Mesh,
    texts: Texts,
    progress: Progress,
    new_basis: str,
) -> None:
    """Writes the same function in the basis of `BASES` that is asked for, in place.

    The sublayers' norms must be folded.
    """
    saved = progress.load("basis")
    if saved is None:
        measured = fitting.importance(dense, mesh, parameters, texts.calibration)
        rotation = new_basis == ROTATION
        saved = {"basis": measured.directions() if rotation else measured.order()}
        progress.save("basis", saved)
    if new_basis == ROTATION or "head" in parameters:
        basis.fold_final_norm(parameters)
    change = basis.turn if new_basis == ROTATION else basis.reorder
    change(parameters, saved["basis"])


def fit(
    parameters: Parameters,
    dense: Config,
    target: Config,
    mesh: Mesh,
    texts: Texts,
    progress: Progress,
) -> dict[tuple[int, str], StreamError]:
    """Fits all sublayers and the head, in place."""
    fitter = Fitter(dense, target.model, mesh, texts.calibration, parameters["embedding"])
    errors = {}
    for layer, kind in fitting.bar(target.model, "fitting"):
        weights = fitting.layer_weights(parameters, layer, kind)
        name = f"layer_{layer}_{kind}"
        fitted = progress.load(name)
        if fitted is None:
            fitted, errors[layer, kind] = fitter.fit(layer, kind, weights)
            progress.save(name, fitted)
        else:
            errors[layer, kind] = fitter.replay(layer, kind, weights, fitted)
        for name, value in fitted.items():
            parameters["layers"][kind][name][layer] = value
    if "head" in parameters:
        parameters["head"] = fitter.fit_head(parameters["head"])
    return errors
