"""Validation loss, and the file of what `eval.py` finds out about a checkpoint."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from caat_jax import activity, files
from caat_jax.checkpoints.trained import restore_model, tokenizer_of
from caat_jax.config.sections import Config
from caat_jax.data.token_cache import open_cache, stored_data
from caat_jax.training.metrics import json_number
from caat_jax.training.step import Programs
from caat_jax.training.validation import summed_loss

REPORT_FILE = "evaluation.json"


class Validation(NamedTuple):
    """A model on the whole validation split."""

    loss_sum: float  # nats
    tokens: int  # that count: all but the first, document ends included
    text_bytes: int  # UTF-8 of all documents

    @property
    def loss(self) -> float:
        """Nats a token; every token counts the same."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss; may be infinite."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.loss))

    @property
    def bits_per_byte(self) -> float:
        """All of the loss, that of document ends too, over the text alone.

        It compares models with different tokenisers, which the loss of a token does not.
        """
        return self.loss_sum / math.log(2) / self.text_bytes

    def figures(self) -> dict[str, float | str]:
        """For the report."""
        return {
            "loss": json_number(self.loss),
            "perplexity": json_number(self.perplexity),
            "bits_per_byte": json_number(self.bits_per_byte),
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
        }

    def table(self) -> str:
        """For people."""
        return (
            f"validation loss  {self.loss:10.6f}  nats per token ({self.tokens:,} tokens)\n"
            f"perplexity       {self.perplexity:10.4f}\n"
            f"bits per byte    {self.bits_per_byte:10.6f}  ({self.text_bytes:,} bytes of UTF-8)"
        )


def evaluate_checkpoint(
    workdir: Path, step: int, config: Config, cache_dir: str | None = None
) -> Validation:
    """One checkpoint on all validation sequences, on this machine's devices, whatever it was
    trained on; `train.eval_sequences` plays no part.  `cache_dir` is as for `stored_data`."""
    data, prepare = stored_data(config.data, cache_dir)
    tokenizer = tokenizer_of(config, workdir)
    sequences = open_cache(data, tokenizer, prepare, for_training=False).validation
    model = restore_model(workdir, step, config)
    programs = Programs(model.config, model.mesh)
    with activity.shown(f"evaluating {len(sequences):,} sequences"):
        loss_sum, count = summed_loss(programs, model.parameters, sequences, limit=-1)
    return Validation(loss_sum, count, sequences.text_bytes)


class Report:
    """`WORKDIR/evaluation.json`: one object about one checkpoint.

    It has the checkpoint's "step", the architecture's "S" and "p", and what was evaluated:
    "validation" (of the run's own split), "other_data" and "tasks".  Devices and batch sizes are
    not in it, since they change nothing.
    """

    def __init__(self, workdir: Path, step: int, config: Config):
        """Reads what is there about the same checkpoint, to add to; nothing is written yet.

        Raises:
          InputError: there is a file that is not such a report.
        """
        model = config.model
        about = {"step": step, "S": model.tp_shards, "p": model.describe_sync_factors()}
        self.path = workdir / REPORT_FILE
        try:
            stored = files.read_json(self.path, dict, "a report of eval.py; move it away")
        except FileNotFoundError:
            stored = {}
        same = {name: stored.get(name) for name in about} == about
        self._content = stored if same else about

    def add_validation(self, validation: Validation, data: str = "") -> None:
        """Writes the figures of the run's validation split, or of other `data`, named so."""
        if data:
            self._content.setdefault("other_data", {})[data] = validation.figures()
        else:
            self._content["validation"] = validation.figures()
        self._write()

    def add_tasks(self, tasks: dict[str, Any]) -> None:
        """Writes the figures of these tasks; those of others stay."""
        self._content["tasks"] = {**self._content.get("tasks", {}), **tasks}
        self._write()

    def _write(self) -> None:
        files.write(self.path, json.dumps(self._content, indent=2, allow_nan=False) + "\n")
