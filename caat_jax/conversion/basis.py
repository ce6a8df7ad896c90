"""Another basis of the residual stream: the same function, other channels.

RMSNorm without γ commutes with every rotation of the D channels.  So, with each γ multiplied into
the weights that read its output, the stream may be turned by any orthogonal matrix: the embedding
and all output projections from the right, what reads the stream from the left.  A tied head reads
the stream through the last γ, which the embedding does not have, so it becomes a weight of its own.

A permutation of the channels also commutes with γ: it leaves norms and a tied head what they are.

Parameters here are nested dictionaries of NumPy arrays in a dense Llama's shapes, changed in place.
"""

from typing import Any

import numpy as np

from caat_jax.conversion import ridge
from caat_jax.conversion.sublayers import INPUTS, OUTPUTS, DenseMoments

RIDGE = 1e-3  # of the mean square of an activation (`ridge.solve`)
SMALLEST = 1e-9  # eigenvalue, over the largest: float32 sums have no smaller ones


def fold_norms(parameters: dict[str, Any]) -> None:
    """Multiplies the sublayers' γ into what reads their outputs; they are 1 then."""
    for kind, names in INPUTS.items():
        weights = parameters["layers"][kind]
        for name in names:
            ones = (1,) * (weights[name].ndim - 2)
            weights[name] = weights["norm"].reshape(*weights["norm"].shape, *ones) * weights[name]
        weights["norm"] = np.ones_like(weights["norm"])


def fold_final_norm(parameters: dict[str, Any]) -> None:
    """The same of the last norm, γ [D], and the head; a tied head becomes one of its own."""
    parameters["head"] = head_columns(parameters)
    parameters["final_norm"] = np.ones_like(parameters["final_norm"])


def head_columns(parameters: dict[str, Any]) -> np.ndarray:
    """γ ⊙ W of the head, tied or not: [D, V]."""
    head = parameters["head"] if "head" in parameters else parameters["embedding"].T
    return parameters["final_norm"][:, None] * head


def turn(parameters: dict[str, Any], basis_DD: np.ndarray) -> None:
    """Makes coordinate c of the stream its component along column c of an orthogonal matrix.

    All norms must be folded.
    """
    basis = basis_DD.astype(np.float32)
    parameters["embedding"] = parameters["embedding"] @ basis
    parameters["head"] = basis.T @ parameters["head"]
    for kind in INPUTS:
        for weights in map(parameters["layers"][kind].__getitem__, INPUTS[kind]):
            for layer, weight in enumerate(weights):
                turned = basis.T @ weight.reshape(len(basis), -1)
                weights[layer] = turned.reshape(weight.shape)
        outputs = parameters["layers"][kind][OUTPUTS[kind]]
        for layer, weight in enumerate(outputs):
            outputs[layer] = weight @ basis


def reorder(parameters: dict[str, Any], order_D: np.ndarray) -> None:
    """Makes channel c of the stream what was channel `order_D[c]`; a tied head stays tied."""
    parameters["embedding"] = parameters["embedding"][:, order_D]
    parameters["final_norm"] = parameters["final_norm"][order_D]
    if "head" in parameters:
        parameters["head"] = parameters["head"][order_D]
    for kind, inputs in INPUTS.items():
        weights = parameters["layers"][kind]
        for name in ("norm", *inputs):
            weights[name] = weights[name][:, order_D]
        weights[OUTPUTS[kind]] = weights[OUTPUTS[kind]][..., order_D]


class Importance:
    """What is lost of a direction of the stream that is private, and what that costs.

    Measured on the dense model.  `loss` [D, D] is the covariance, summed over sublayers and shards,
    of what the other shards add and a linear function of the shard's own activations cannot tell;
    `reading` [D, D] is how much input projections and the head read of each direction.
    """

    def __init__(self, width: int):
        self.loss = np.zeros((width, width))
        self.reading = np.zeros((width, width))

    def add_written(self, moments: DenseMoments) -> None:
        """Adds what a sublayer writes to the stream."""
        for own, cross, others in zip(*moments, strict=True):
            known = ridge.solve(own, cross, np.zeros_like(cross), RIDGE)
            self.loss += others - cross.T.astype(np.float64) @ known

    def add_read(self, weight: np.ndarray) -> None:
        """Adds a weight that reads the stream, γ included: [D, n]."""
        self.reading += weight @ weight.T / np.sum(np.square(weight))

    def order(self) -> np.ndarray:
        """Channels, those first that cost most when private: int [D]."""
        return np.argsort(-self.loss.diagonal() * self.reading.diagonal(), kind="stable")

    def directions(self) -> np.ndarray:
        """An orthogonal matrix [D, D] whose first columns cost most when private.

        What is lost must be large, and be read: the two matrices are multiplied as numbers would
        be, by adding their logarithms.
        """
        values, vectors = np.linalg.eigh(_logarithm(self.loss) + _logarithm(self.reading))
        return vectors[:, np.argsort(-values)]


def _logarithm(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * np.log(np.maximum(values, values[-1] * SMALLEST)) @ vectors.T
