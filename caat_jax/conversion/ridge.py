"""Least squares from moments, in float64."""

import numpy as np


def solve(gram: np.ndarray, cross: np.ndarray, prior: np.ndarray, strength: float) -> np.ndarray:
    """The W that minimises Σ|a·W − y|² + strength · mean(diag gram) · |W − prior|².

    Where the data say nothing, W is the prior.

    Args:
      gram: Σ aᵀa, [n, n].
      cross: Σ aᵀy, [n, m].
      prior: [n, m].
      strength: above 0; relative to the mean square of an input.

    Returns:
      float64 [n, m]
    """
    gram = gram.astype(np.float64)
    penalty = strength * np.trace(gram) / len(gram)
    if not penalty:  # all inputs were 0
        return prior.astype(np.float64)
    left = gram + penalty * np.eye(len(gram))
    return prior + np.linalg.solve(left, cross - gram @ prior)
