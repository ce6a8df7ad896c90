"""Validation loss."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from caat_jax import sharding
from caat_jax.checkpoint import Checkpoints
from caat_jax.config import Config, resolve_mesh
from caat_jax.data.loader import validation_batches
from caat_jax.data.token_cache import TokenSequences, open_cache
from caat_jax.data.tokenizers import load_tokenizer
from caat_jax.train_step import Programs, wait_if_simulated


def validation_loss(programs: Programs, parameters: Any, sequences: TokenSequences) -> float:
    """Mean cross-entropy, in nats a token, over the first `train.eval_sequences` sequences.

    Every target counts the same; padding does not count.  The sums over batches are float64.
    """
    train = programs.config.train
    batches = validation_batches(
        sequences,
        batch=train.global_batch // train.accumulation_steps,
        limit=train.eval_sequences,
        sharding=programs.batch_sharding,
    )
    sums = [wait_if_simulated(programs.eval_step(parameters, batch)) for batch in batches]
    loss_sum, count = np.array([[float(s), float(c)] for s, c in sums]).sum(axis=0)
    return float(loss_sum / count)


def evaluate_checkpoint(workdir: Path, step: int, config: Config) -> float:
    """The validation loss of one checkpoint, on this machine's devices, whatever it trained on."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = config.with_vocabulary(tokenizer.size)
    mesh = sharding.create_mesh(resolve_mesh(config, len(jax.devices())))
    cache = open_cache(config.data, tokenizer)
    programs = Programs(config, mesh)
    with Checkpoints(workdir) as checkpoints:
        parameters = checkpoints.restore_parameters(step, programs)
    return validation_loss(programs, parameters, cache.validation)
