"""The metrics file and its reader, model FLOPs, throughput."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caat_jax import config as config_lib
from caat_jax.errors import InputError
from caat_jax.metrics import (
    METRICS_FILE,
    MetricsWriter,
    Throughput,
    model_flops_per_token,
    peak_flops,
    read_metrics,
)
from configs import llama_7b
from tests import models


def test_values_come_back_with_the_same_bits(tmp_path):
    values = [0.1 + 0.2, 1e-45, -0.0, float(np.float32(1 / 3)), math.inf, -math.inf]
    with MetricsWriter(tmp_path) as writer:
        for step, value in enumerate(values, start=1):
            writer.write(step, {"train/loss": jnp.float32(1.5), "x": value})
        writer.write(9, {"x": math.nan})
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 1, "train/loss": 1.5, "x": values[0]}
    steps, read = read_metrics(tmp_path / METRICS_FILE)["x"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert read[:-1].tobytes() == np.array(values).tobytes()
    assert math.isnan(read[-1])


def test_resuming_drops_later_steps_and_a_half_written_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"x": step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "x"')
    assert read_metrics(tmp_path / METRICS_FILE)["x"][0].tolist() == [1, 2, 3, 4]
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"x": 30})
    steps, values = read_metrics(tmp_path / METRICS_FILE)["x"]
    assert steps.tolist() == [1, 2, 3]
    assert values.tolist() == [1, 2, 30]
    assert list(tmp_path.glob("tensorboard/*"))


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write(1, {"x": 1})
    assert read_metrics(tmp_path / METRICS_FILE)["x"][0].tolist() == [1]


@pytest.mark.parametrize("line", ["{", "[1]", '{"x": 1}', '{"step": "1"}', '{"step": 1, "x": NaN}'])
def test_malformed_lines_are_named(tmp_path, line):
    path = tmp_path / METRICS_FILE
    path.write_text(f'{{"step": 1, "x": 2.0}}\n{line}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)
    with pytest.raises(InputError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        read_metrics(tmp_path / METRICS_FILE)


def test_flops_of_the_7b_model():
    """6.61e9 parameters are in its matrices: 6.74e9 less one embedding table."""
    arch = config_lib.resolve(llama_7b.get_config()).model
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 4096 * 32_000
    attention = 32 * 4096 * 4096 * 6
    assert model_flops_per_token(arch, 4096) == 6 * matrices + attention


def test_flops_against_the_compilers_count():
    """The compiler counts all of the attention matrix, model FLOPs its causal half."""
    config = models.small_config(
        model=dict(embed_dim=128, mlp_dim=512, vocab_size=512),
        compute=dict(scan_layers=False),  # the compiler counts a loop's body once
    )
    arch, length, batch = config.model, 16, 8
    programs = models.programs(config)
    rows = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    forward = jax.jit(programs.eval_step).lower(programs.state_shapes.parameters, rows)
    counted = forward.compile().cost_analysis()["flops"] / (batch * length)
    causal_half = 2 * arch.layers * arch.heads * arch.head_dim * length
    model_flops = model_flops_per_token(arch, length) / 3  # backward is twice forward
    assert counted == pytest.approx(
        model_flops + causal_half, rel=0.03
    )  # norms and softmax are extra


def test_peaks():
    assert peak_flops("TPU v5p", "bfloat16") == 459e12
    assert peak_flops("TPU v5p", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None


def test_throughput():
    now = [100.0]
    throughput = Throughput(
        4, tokens_per_step=1000, flops_per_token=6.0, peak_flops=24_000.0, clock=lambda: now[0]
    )
    now[0] += 2.0
    expected = {"step_time_ms": 500.0, "tokens_per_second": 2000.0, "mfu": 0.5}
    assert throughput.measure(8) == expected
    now[0] += 60.0  # an evaluation
    throughput.restart(8)
    now[0] += 0.5
    assert throughput.measure(9) == expected
