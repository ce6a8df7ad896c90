"""The loss on validation sequences, during training and afterwards."""

from typing import Any

import numpy as np

from caat_jax.data.loader import validation_batches
from caat_jax.data.token_cache import TokenSequences
from caat_jax.devices.dispatch import wait_if_simulated
from caat_jax.training.step import Programs


def validation_loss(programs: Programs, parameters: Any, sequences: TokenSequences) -> float:
    """Mean cross-entropy, in nats a token, over the first `train.eval_sequences` sequences.

    Every target counts the same; padding does not count.
    """
    limit = programs.config.train.eval_sequences
    loss_sum, count = summed_loss(programs, parameters, sequences, limit)
    return loss_sum / count


def summed_loss(
    programs: Programs, parameters: Any, sequences: TokenSequences, limit: int
) -> tuple[float, int]:
    """Cross-entropy in nats, and the targets counted; the sums over batches are float64."""
    train = programs.config.train
    batches = validation_batches(
        sequences,
        batch=train.global_batch // train.accumulation_steps,
        limit=limit,
        sharding=programs.batch_sharding,
    )
    sums = [wait_if_simulated(programs.eval_step(parameters, batch)) for batch in batches]
    loss_sum, count = np.array([[float(s), float(c)] for s, c in sums]).sum(axis=0)
    return float(loss_sum), int(count)
