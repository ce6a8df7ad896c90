"""What a run measures: the file of metrics, its reader, throughput and model FLOPs.

`WORKDIR/metrics.jsonl` holds one JSON object a line: `{"step": 10, "train/loss": 2.5, ...}`.
Floats are written as `repr` writes them, so reading gives back the same bits; JSON has no number
for those that are not finite, so they are the strings "nan", "inf" and "-inf".  A line counts once
its newline is written: a last line without one was cut off when the run was killed.

TensorBoard events of the same values lie in `WORKDIR/tensorboard/`.
"""

import array
import contextlib
import json
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from caat_jax import files
from caat_jax.config.architecture import Architecture
from caat_jax.devices import chips
from caat_jax.errors import InputError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

_LONGEST_LINE = 1 << 20  # bytes

_NOT_FINITE = ("nan", "inf", "-inf")


class MetricsWriter:
    """Appends to `WORKDIR/metrics.jsonl` and to TensorBoard events; one process writes.

    A context manager: leaving it closes both.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
        """Opens both for appending.

        Args:
          workdir: a folder of a file system (not a bucket); made when missing.
          resume_step: the step of the checkpoint that the run continues from.  Lines of later
            steps, which a run wrote between that checkpoint and its end, are dropped, so that no
            step is there twice.  None: a run from the beginning, so all lines are dropped.

        Raises:
          InputError: the end of the file that is there is malformed; the message names the place.
        """
        from caat_jax.training import tensorboard

        last_step = -1 if resume_step is None else resume_step
        self.workdir = Path(workdir)
        path = self.workdir / METRICS_FILE
        with self._write_errors():
            self.workdir.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(path, last_step)
            # Line buffering: whoever follows the run sees a line as soon as it is written.
            self._lines = path.open("a", encoding="utf-8", buffering=1)
        self._events = tensorboard.Events(self.workdir / TENSORBOARD_FOLDER, last_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line; `values` maps names such as "train/loss" to anything `float` takes.

        Raises:
          InputError: the disk does not take it.
        """
        values = {name: float(value) for name, value in values.items()}
        line = {name: json_number(value) for name, value in values.items()}
        with self._write_errors():
            self._lines.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
            self._events.write(step, values)

    def synchronise(self) -> None:
        """Returns when the lines so far are on the disk.

        Raises:
          InputError: the disk does not take them.
        """
        with self._write_errors():
            os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Closes both; nothing can be written afterwards."""
        with self._write_errors():
            try:
                self._lines.close()
            finally:
                self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        # What ended the run is more to the point than what its end could not write.
        with contextlib.nullcontext() if exception is None else contextlib.suppress(InputError):
            self.close()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the metrics in {self.workdir} cannot be written: {error.strerror or error}"
            ) from error


def json_number(value: float) -> float | str:
    """The value, or "nan", "inf" or "-inf", for which JSON has no number."""
    return value if math.isfinite(value) else str(value)


def read_metrics(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads a metrics file, also while the run writes to it or after it was killed.

    Returns:
      For each name: the steps at which it was written (int64) and its values there (float64), in
      the order of the file.

    Raises:
      InputError: the file is missing or malformed; the message names the file and the line.
    """
    columns: dict[str, tuple[array.array, array.array]] = {}
    for step, values in _complete_lines(Path(path)):
        for name, value in values.items():
            steps, column = columns.setdefault(name, (array.array("q"), array.array("d")))
            steps.append(step)
            column.append(value)
    return {
        name: (np.array(steps, np.int64), np.array(column, np.float64))
        for name, (steps, column) in columns.items()
    }


def model_flops_per_token(architecture: Architecture, sequence_length: int) -> float:
    """Floating-point operations of one training step per token, forward and backward.

    PaLM (arXiv:2204.02311), appendix B: 6·N + 12·layers·heads·head_dim·T.  N counts the matrix
    parameters a token is multiplied with: projections, MLP and head (with the vocabulary's
    padding), not the embedding look-up and not the norms.  Attention is causal, so a token meets
    T/2 others on average and its term is halved here: 6·layers·heads·head_dim·T.

    What rematerialisation computes a second time is not counted: divided by peak FLOP/s this gives
    model (MFU), not hardware FLOPs utilisation.  The synchronisation factors change nothing: the
    shards' matrices have the dense model's sizes together, whatever p.
    """
    width, head_dim = architecture.embed_dim, architecture.head_dim
    query_and_output = 2 * width * architecture.heads * head_dim
    key_and_value = 2 * width * architecture.kv_heads * head_dim
    gate_up_and_down = 3 * width * architecture.mlp_dim
    layer = query_and_output + key_and_value + gate_up_and_down
    matrix_parameters = architecture.layers * layer + width * architecture.vocab_size
    attention = 6 * architecture.layers * architecture.heads * head_dim * sequence_length
    return float(6 * matrix_parameters + attention)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The vendor's dense peak of one device in FLOP/s, or None where none is known.

    Args:
      device_kind: as `jax.Device.device_kind` has it.
      dtype: of the matrix products, `config.Compute.dtype`.  Only bfloat16 has figures: vendors
        give none for float32 on TPUs, and on GPUs it depends on the matmul precision.
    """
    chip = chips.by_device_kind(device_kind)
    return chip.flops if chip and dtype == "bfloat16" else None


class Throughput:
    """Step time, tokens per second and MFU over the interval since the last measurement."""

    def __init__(
        self,
        step: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the first interval.

        Args:
          step: steps completed so far.
          tokens_per_step: of the global batch, on all devices together.
          flops_per_token: see `model_flops_per_token`.
          peak_flops: FLOP/s of all devices together; None leaves MFU out.
          clock: seconds since some moment.
        """
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self.restart(step)

    def restart(self, step: int) -> None:
        """Starts an interval, so that what went before (evaluation, a save) is not in it."""
        self._step, self._start = step, self._clock()

    def measure(self, step: int) -> dict[str, float]:
        """The metrics of the steps since the interval's start, which must be some; starts anew.

        Returns:
          "step_time_ms" (milliseconds), "tokens_per_second" (all devices together) and, where the
          peak is known, "mfu" (a fraction of 1).
        """
        steps, seconds = step - self._step, self._clock() - self._start
        self.restart(step)
        tokens_per_second = steps * self._tokens_per_step / seconds
        measured = {
            "step_time_ms": 1000 * seconds / steps,
            "tokens_per_second": tokens_per_second,
        }
        if self._peak_flops is not None:
            measured["mfu"] = tokens_per_second * self._flops_per_token / self._peak_flops
        return measured


def _complete_lines(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The step and the values by name of each line that ends with a newline."""
    try:
        with files.open_regular(path) as file:
            lines = iter(lambda: file.readline(_LONGEST_LINE), b"")
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                    return  # cut off
                yield _parsed(line, f"{path}, line {number}")
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; train.py writes it into its --workdir"
        ) from None


def _parsed(line: bytes, name: str) -> tuple[int, dict[str, float]]:
    try:
        values = files.parse_json(line, dict)
        step = values.pop("step", None)
        if type(step) is not int or not 0 <= step < 1 << 63:
            raise ValueError(f"its step is {step!r}, not an integer of 0 or more")
        return step, {name: _to_float(name, value) for name, value in values.items()}
    except (ValueError, OverflowError) as error:
        raise InputError(f"{name}: {error}") from None


def _to_float(name: str, value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int or value in _NOT_FINITE:
        return float(value)
    raise ValueError(f"{name} is {value!r}; a number or one of {', '.join(_NOT_FINITE)} is allowed")


def _drop_lines_after(path: Path, last_step: int) -> None:
    """Keeps the complete lines of steps up to `last_step`, which come first.

    Reads from the end, and only what is dropped and the line before that.
    """
    if path.is_symlink() or not path.exists() or not path.stat().st_size:
        files.write(path, b"")  # never through a link
        return
    with (
        files.open_regular(path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        kept = content.rfind(b"\n") + 1
        while kept:
            start = content.rfind(b"\n", 0, kept - 1) + 1
            step, _ = _parsed(content[start:kept], f"{path}, at byte {start}")
            if step <= last_step:
                break
            kept = start
    with path.open("r+b") as file:
        file.truncate(kept)
        os.fsync(file.fileno())
