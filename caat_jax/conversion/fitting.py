"""Layer by layer: weights with which every shard's stream stays near the dense model's.

Sublayers are fitted in order, with the streams as the fitted ones before have left them.  For each,

1. what reads the stream: shard j sees its normalised stream h_j instead of the dense model's h.
   A_j, D x D, is the least-squares estimate h_j·A_j of h, and W becomes A_j·W for its columns;
2. what writes to it: the private rows of shard j are the W'_j with which √S·a_j·W'_j is nearest to
   x − x_j, the dense stream after the sublayer minus the shard's before it; the shared rows are
   the W' with which Σ_k a_k·W'_k is.

Each is a ridge regression on sums over the calibration tokens, and its penalty is the distance to
the weights that there were: where the text says little, they stay.

Axis letters: as in `sublayers.py`.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from caat_jax.config.architecture import Architecture
from caat_jax.config.sections import Config
from caat_jax.conversion import ridge
from caat_jax.conversion.basis import Importance, head_columns
from caat_jax.conversion.sublayers import INPUTS, OUTPUTS, InputMoments, OutputMoments, Sublayers
from caat_jax.devices.dispatch import wait_if_simulated

# Of the mean square of an input (`ridge.solve`).
INPUT_RIDGE, PRIVATE_RIDGE, SHARED_RIDGE = 1e-3, 1e-3, 1e-2

Weights = dict[str, np.ndarray]  # of one sublayer


class StreamError(NamedTuple):
    """The shards' distance from the dense stream after a sublayer, over that stream's norm: the
    root of the mean square over tokens."""

    cut: float  # with the dense model's weights, cut, after all that was fitted before
    fitted: float


class Fitter:
    """Takes the streams of all calibration sequences through the network, fitting on the way.

    A device holds one sublayer's weights and moments, and its part of one batch; the streams and
    activations of all batches lie in the host's memory.
    """

    def __init__(
        self,
        config: Config,
        arch: Architecture,
        mesh: Mesh,
        batches: list[np.ndarray],
        embedding_VD: np.ndarray,
    ):
        """Starts at the embedding.

        Args:
          config: the dense model's, with S shards.
          arch: what it is to become: the same but for the synchronisation factors.
          mesh: whole over `fsdp`.
          batches: token ids, int32 [B, T] each; the mesh splits B evenly.
          embedding_VD: float32.
        """
        self._arch = arch
        self._sublayers = {kind: Sublayers(config, mesh, kind) for kind in INPUTS}
        self._dense = [embedding_VD[batch] for batch in batches]  # [B, T, D]
        self._streams = [np.stack([x] * arch.tp_shards) for x in self._dense]  # [S, B, T, D]
        self._is_dense = True  # no shard's stream differs from the dense model's yet

    def fit(self, layer: int, kind: str, weights: Weights) -> tuple[Weights, StreamError]:
        """Fits the next sublayer, `kind` of `layer`, and takes all streams through it.

        `weights` are the dense model's; γ must be 1.
        """
        fitted = dict(weights)
        if not self._is_dense:
            moments = self._input_moments(kind)
            fitted |= read_by_estimate(kind, weights, moments)
        width = self._width(layer, kind)
        self._is_dense &= width == self._arch.embed_dim
        moments, after, activations = self._output_moments(kind, weights, fitted, width)
        if not self._is_dense:
            rows = weights[OUTPUTS[kind]]
            fitted[OUTPUTS[kind]] = fitted_rows(rows, moments, self._arch.tp_shards, width)
        return fitted, self._advance(kind, weights, fitted, width, after, activations)

    def replay(self, layer: int, kind: str, weights: Weights, fitted: Weights) -> StreamError:
        """Takes all streams through a sublayer that was fitted before."""
        width = self._width(layer, kind)
        self._is_dense &= width == self._arch.embed_dim
        _, after, activations = self._output_moments(kind, weights, fitted, width)
        return self._advance(kind, weights, fitted, width, after, activations)

    def fit_head(self, head_DV: np.ndarray) -> np.ndarray:
        """The head that reads the shards' last streams; the dense model's has its norm folded."""
        if self._is_dense:
            return head_DV
        moments = self._input_moments("mlp")
        return by_estimate(head_DV, moments)

    def _width(self, layer: int, kind: str) -> int:
        return self._arch.sync_widths[layer][list(INPUTS).index(kind)]

    def _input_moments(self, kind: str) -> InputMoments:
        programs = self._sublayers[kind]
        moments = programs.no_input_moments()
        for x, streams in zip(self._dense, self._streams, strict=True):
            moments = programs.input_moments(moments, x, streams)
            wait_if_simulated(moments)
        return jax.tree.map(np.asarray, moments)

    def _output_moments(
        self, kind: str, weights: Weights, fitted: Weights, width: int
    ) -> tuple[OutputMoments, list[np.ndarray], list[np.ndarray]]:
        programs = self._sublayers[kind]
        weights, fitted = programs.on_mesh(weights), programs.on_mesh(fitted)
        is_shared = np.arange(self._arch.embed_dim) < width
        moments, after, activations = programs.no_output_moments(), [], []
        for x, streams in zip(self._dense, self._streams, strict=True):
            moments, *results = programs.output_moments(
                moments, weights, fitted, is_shared, x, streams
            )
            dense_after, a = map(np.asarray, results)
            after.append(dense_after)
            activations.append(a)
        return jax.tree.map(np.asarray, moments), after, activations

    def _advance(
        self,
        kind: str,
        weights: Weights,
        fitted: Weights,
        width: int,
        after: list[np.ndarray],
        activations: list[np.ndarray],
    ) -> StreamError:
        programs = self._sublayers[kind]
        weights, fitted = programs.on_mesh(weights), programs.on_mesh(fitted)
        total = np.zeros(3)
        for number in range(len(after)):
            streams, squares = programs.add(width)(
                self._streams[number], fitted, weights, activations[number], after[number]
            )
            self._streams[number] = np.asarray(streams)
            total += np.asarray(squares)
        self._dense = after
        return StreamError(
            cut=math.sqrt(total[1] / total[2]), fitted=math.sqrt(total[0] / total[2])
        )


def importance(
    config: Config, mesh: Mesh, parameters: dict[str, Any], batches: list[np.ndarray]
) -> Importance:
    """Of the directions of the dense model's stream; the sublayers' norms are folded."""
    measured = Importance(config.model.embed_dim)
    measured.add_read(head_columns(parameters))
    sublayers = {kind: Sublayers(config, mesh, kind) for kind in INPUTS}
    dense = [parameters["embedding"][batch] for batch in batches]
    for layer, kind in bar(config.model, "measuring the dense stream"):
        programs, weights = sublayers[kind], layer_weights(parameters, layer, kind)
        inputs = [weights[name].reshape(len(weights[name]), -1) for name in INPUTS[kind]]
        measured.add_read(np.concatenate(inputs, axis=1))
        weights, moments = programs.on_mesh(weights), programs.no_dense_moments()
        for number, x in enumerate(dense):
            moments, after = programs.dense_moments(moments, weights, x)
            dense[number] = np.asarray(after)
        measured.add_written(jax.tree.map(np.asarray, moments))
    return measured


def bar(arch: Architecture, what: str) -> Iterable[tuple[int, str]]:
    """Every sublayer in order, (layer, kind), with a progress bar on a terminal."""
    sublayers = list(itertools.product(range(arch.layers), INPUTS))
    return tqdm.tqdm(sublayers, what, unit="sublayer", dynamic_ncols=True, disable=None)


def layer_weights(parameters: dict[str, Any], layer: int, kind: str) -> Weights:
    """One sublayer's."""
    return {name: stacked[layer] for name, stacked in parameters["layers"][kind].items()}


def read_by_estimate(kind: str, weights: Weights, moments: InputMoments) -> Weights:
    """The weights that read the stream, by what each shard's tells of the dense model's."""
    return {name: by_estimate(weights[name], moments) for name in INPUTS[kind]}


def by_estimate(weight: np.ndarray, moments: InputMoments) -> np.ndarray:
    """A_j @ W for the columns of each shard j, h_j @ A_j being its estimate of h.

    Args:
      weight: [D, ...], the columns of shard after shard, or of heads that shards share.
      moments: of the streams that are read.
    """
    width, shards = len(weight), len(moments.own)
    parts = min(shards, weight.shape[1])  # shards with one key/value head have one A
    by_part = weight.reshape(width, parts, -1)
    own, dense = (m.reshape(parts, -1, width, width).sum(axis=1) for m in moments)
    fitted = [
        ridge.solve(own[part], dense[part], np.eye(width), INPUT_RIDGE) @ by_part[:, part]
        for part in range(parts)
    ]
    return np.stack(fitted, axis=1).astype(np.float32).reshape(weight.shape)


def fitted_rows(
    rows: np.ndarray, moments: OutputMoments, tp_shards: int, sync_width: int
) -> np.ndarray:
    """An output projection [..., D], rows of shard after shard, as the moments have it best."""
    by_shard = rows.reshape(tp_shards, -1, rows.shape[-1])  # [S, k, D]
    k = by_shard.shape[1]
    fitted = np.empty_like(by_shard)
    if sync_width:
        fitted[..., :sync_width] = ridge.solve(
            moments.activations.reshape(tp_shards * k, -1),
            moments.missing[..., :sync_width].reshape(tp_shards * k, -1),
            by_shard[..., :sync_width].reshape(tp_shards * k, -1),
            SHARED_RIDGE,
        ).reshape(tp_shards, k, -1)
    for shard in range(tp_shards):
        own = moments.activations[shard, :, shard * k : (shard + 1) * k]
        private = np.s_[shard, :, sync_width:]
        fitted[private] = ridge.solve(
            own, moments.missing[private], by_shard[private], PRIVATE_RIDGE
        ) / math.sqrt(tp_shards)
    return fitted.reshape(rows.shape)
