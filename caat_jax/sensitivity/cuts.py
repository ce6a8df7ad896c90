"""How far the validation loss rises when the synchronisation of one sublayer is cut.

A cut is a model of its own: the checkpoint's parameters, which have the same shapes whatever the
factors, in the architecture in which one sublayer has a smaller factor.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tqdm

from caat_jax.checkpoints.trained import restore_model, tokenizer_of
from caat_jax.config.architecture import Architecture, SyncFactors
from caat_jax.config.sections import Config
from caat_jax.data.token_cache import open_cache, stored_data
from caat_jax.devices import processes
from caat_jax.training.step import Programs
from caat_jax.training.validation import validation_loss

SUBLAYERS = ("attention", "mlp")  # as in each pair of `Architecture.sync_factors`


class Cut(NamedTuple):
    """One sublayer's factor made smaller."""

    layer: int  # from 0
    sublayer: str  # of SUBLAYERS
    sync_factor: float


class Sensitivity(NamedTuple):
    """A checkpoint's validation losses with and without cuts, all over the same sequences."""

    step: int
    config: Config  # the checkpoint's
    uncut_loss: float  # nats a token
    cut_losses: dict[Cut, float]

    def rise(self, cut: Cut) -> float:
        """Of the loss, in nats a token; negative where the cut made it smaller."""
        return self.cut_losses[cut] - self.uncut_loss

    def sync_factors(self) -> list[float]:
        """The factors that were cut to, the largest first."""
        return sorted({cut.sync_factor for cut in self.cut_losses}, reverse=True)


def cuts_below(model: Architecture, sync_factors: Sequence[float]) -> list[Cut]:
    """Every sublayer cut to each of these factors that is below its own."""
    return [
        Cut(layer, sublayer, factor)
        for layer, pair in enumerate(model.sync_factors)
        for sublayer, own in zip(SUBLAYERS, pair, strict=True)
        for factor in sync_factors
        if factor < own
    ]


class Validation:
    """A checkpoint on this machine's devices, and the sequences that all its losses are over.

    Every process of the run makes one, and calls it with the same factors in the same order.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        config: Config,
        sequences: int,
        cache_dir: str | None = None,
    ):
        """Restores the checkpoint of a step, whatever mesh it was trained on.

        Args:
          workdir: of the run.
          step: the checkpoint's.
          config: the checkpoint's.
          sequences: how many of the validation split's, from its beginning; -1: all.
          cache_dir: as for `stored_data`.
        """
        self.step, self.config = step, config
        train = dataclasses.replace(config.train, eval_sequences=sequences)
        data, prepare = stored_data(config.data, cache_dir)
        self._sequences = open_cache(
            data, tokenizer_of(config, workdir), prepare, for_training=False
        ).validation
        self._model = restore_model(workdir, step, dataclasses.replace(config, train=train))
        self.loss = functools.cache(self._loss)

    def _loss(self, sync_factors: SyncFactors) -> float:
        """In nats a token, with these factors; a program of its own is compiled."""
        model = self._model
        programs = Programs(model.config.with_sync_factors(sync_factors), model.mesh)
        found = validation_loss(programs, model.parameters, self._sequences)
        # JAX keeps a compiled program for as long as its function lives, and `Programs` has cycles.
        programs.eval_step.clear_cache()
        return found


def measure(validation: Validation, cuts: Sequence[Cut]) -> Sensitivity:
    """Evaluates a checkpoint and its cuts, each of which is compiled on its own."""
    config = validation.config
    uncut_loss = validation.loss(config.model.sync_factors)
    losses = {}
    # No bar where the output is no terminal, nor on other processes than the first.
    disable = None if processes.is_first() else True
    for cut in tqdm.tqdm(cuts, "cutting", unit="cut", dynamic_ncols=True, disable=disable):
        losses[cut] = validation.loss(_applied(cut, config.model))
    return Sensitivity(validation.step, config, uncut_loss, losses)


def _applied(cut: Cut, model: Architecture) -> SyncFactors:
    factors = [list(pair) for pair in model.sync_factors]
    factors[cut.layer][SUBLAYERS.index(cut.sublayer)] = cut.sync_factor
    return tuple(map(tuple, factors))
