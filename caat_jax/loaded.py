"""A trained model for notebooks and scripts: `caat_jax.load`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from caat_jax.checkpoints import checkpoints
from caat_jax.checkpoints.trained import TrainedModel, restore_model
from caat_jax.config.architecture import checked_sync_factors
from caat_jax.config.resolve import check_mesh
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.data.token_cache import PADDING
from caat_jax.data.tokenizers import Tokenizer
from caat_jax.devices import sharding
from caat_jax.devices.dispatch import wait_if_simulated
from caat_jax.errors import InputError
from caat_jax.huggingface import importing, llama_config
from caat_jax.inference.generator import GREEDILY
from caat_jax.inference.sampling import Sampling
from caat_jax.inference.text import TextGenerator
from caat_jax.model.partial_sync import Stream
from caat_jax.storage import mirrors
from caat_jax.training.step import Programs


def load(
    path: str | os.PathLike,
    *,
    mesh: Mapping[str, int] | None = None,
    tp_shards: int | None = None,
    sync_factor: float | Sequence | None = None,
    pad: bool = False,
) -> "LoadedModel":
    """Loads a model onto this machine's devices, whatever it was trained on.

    Args:
      path: a run's folder, or its URL in a bucket, whose newest checkpoint is taken; or a folder
        with a Llama in Hugging Face's format.
      mesh: sizes of the mesh axes `data`, `fsdp` and `model`, 1 where left out; their product may
        be smaller than the number of devices.  By default all devices are used, as many as
        possible for `model`.
      tp_shards: S of a Llama in Hugging Face's format, by default 1; a run has its own.
      sync_factor: instead of the model's own: p of every sublayer, or of each layer as
        `model.sync_factor_per_layer` has them.  It is another function.
      pad: whether to add zero heads, MLP columns and ids to a Llama in Hugging Face's format where
        S does not divide them: the same function at p = 1.

    Raises:
      InputError: there is no model, or it does not fit what is given.
    """
    folder = mirrors.folder("path", os.fspath(path))
    sizes = dict(data=-1, fsdp=1, model=-1) if mesh is None else dict(data=1, fsdp=1, model=1)
    if unknown := set(mesh or ()) - set(sizes):
        raise InputError(f"mesh has no axis {unknown.pop()!r}; there are {', '.join(sizes)}")
    sizes = MeshConfig(**sizes | dict(mesh or {}), simulated_devices=0)
    devices = jax.devices()
    if mesh is not None:
        devices = devices[: sizes.data * sizes.fsdp * sizes.model]
    if (folder / llama_config.FILE).is_file():
        shards = tp_shards or 1
        check_mesh(sizes, shards)
        model = importing.read_llama(
            folder, tp_shards=shards, sizes=sizes, devices=devices, pad=pad
        )
        config = _with_sync_factor(model.config, sync_factor)
        return LoadedModel(dataclasses.replace(model, config=config))
    if tp_shards is not None or pad:
        given = f"pad={pad}" if tp_shards is None else f"tp_shards={tp_shards}"
        raise InputError(f"{given}: the run in {folder} has its own")
    step, config = checkpoints.newest_config(folder)
    config = _with_sync_factor(config, sync_factor)
    check_mesh(sizes, config.model.tp_shards)
    config = dataclasses.replace(config, mesh=sizes)
    return LoadedModel(restore_model(folder, step, config, devices))


def _with_sync_factor(config: Config, given: float | Sequence | None) -> Config:
    if given is None:
        return config
    return config.with_sync_factors(checked_sync_factors("sync_factor", given, config.model.layers))


class LoadedModel:
    """A model on the devices of a mesh.  Tokens are integers [B, T]; any B will do.

    Attributes:
      config: the checkpoint's, its mesh worked out.
      mesh: of `jax.sharding`.
      parameters: a nested dictionary, laid out over the mesh; matrices in `compute.dtype`.
      tokenizer: the one it was trained with.
    """

    def __init__(self, model: TrainedModel):
        self._model = model
        self.config, self.mesh, self.parameters = model.config, model.mesh, model.parameters
        self._programs = Programs(model.config, model.mesh)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    def logits(self, tokens: ArrayLike) -> jax.Array:
        """float32 [B, T, V]: of the token after each; −∞ for ids that only pad the vocabulary."""
        return self._run(self._programs.logits_step, tokens)

    def loss(self, tokens: ArrayLike) -> float:
        """Mean cross-entropy of tokens 1 to T − 1 given those before, in nats."""
        rows = self._rows(tokens, least=2, fill=PADDING)
        total, count = wait_if_simulated(self._programs.eval_step(self.parameters, rows))
        return float(total) / int(count)

    def streams(self, tokens: ArrayLike) -> Stream:
        """The residual streams after the last layer, of all S shards.

        Returns:
          `common` [B, T, w], the channels that all shards share, and `private` [S, B, T, D − w],
          in the compute type.  Where nothing is private, `private` is empty.
        """
        common, private = self._run(self._programs.streams_step, tokens, cut=False)
        rows = len(np.asarray(tokens))
        return Stream(common[:rows], private[:, :rows])

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int = 128, sampling: Sampling = GREEDILY
    ) -> list[str]:
        """What follows each prompt, up to the end of its document.

        Raises:
          InputError: a prompt is too long, or an argument impossible.
        """
        texts = [""] * len(prompts)
        for number, piece, _ in self._text_generator.stream(
            list(prompts), max_new_tokens=max_new_tokens, sampling=sampling
        ):
            texts[number] += piece
        return texts

    @functools.cached_property
    def _text_generator(self) -> TextGenerator:
        return TextGenerator(self._model)

    def _run(self, program: Callable, tokens: ArrayLike, cut: bool = True) -> Any:
        rows = self._rows(tokens, least=1, fill=0)
        result = wait_if_simulated(program(self.parameters, rows))
        return result[: len(np.asarray(tokens))] if cut else result

    def _rows(self, tokens: ArrayLike, least: int, fill: int) -> jax.Array:
        """The tokens on the mesh, with rows of `fill` up to a multiple of the batch's parts."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] < least or tokens.dtype.kind not in "iu":
            raise InputError(
                f"tokens of type {tokens.dtype} and shape {tokens.shape} must be integers [B, T]"
                f" with T at least {least}"
            )
        vocabulary = self.config.model.vocab_size - self.config.model.vocab_padding
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
            raise InputError(f"tokens must lie within [0, {vocabulary})")
        missing = -len(tokens) % sharding.data_parallel_size(self.mesh)
        tokens = np.pad(tokens, ((0, missing), (0, 0)), constant_values=fill)
        return jax.device_put(tokens.astype(np.int32), self._programs.batch_sharding)
