"""The metrics file and its reader, model FLOPs, throughput."""

import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from caat_jax.config.architecture import Architecture
from caat_jax.config.resolve import resolve
from caat_jax.errors import InputError
from caat_jax.training.metrics import (
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    MetricsWriter,
    Throughput,
    model_flops_per_token,
    peak_flops,
    read_metrics,
)
from configs import llama_7b


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


def read_events(workdir) -> list[Event]:
    """The TensorBoard events of all files: length, 4 bytes, event, 4 bytes, and so on."""
    events = []
    for path in sorted((workdir / TENSORBOARD_FOLDER).iterdir()):
        content, offset = path.read_bytes(), 0
        while offset < len(content):
            (length,) = struct.unpack_from("<Q", content, offset)
            events.append(Event.FromString(content[offset + 12 : offset + 12 + length]))
            offset += 12 + length + 4
    return events


def test_a_line_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"x": 1.0})
        assert json.loads((tmp_path / METRICS_FILE).read_text())["step"] == 1


def test_tensorboard_has_the_values_and_hides_what_a_resume_repeats(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"x": float(step)})
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"x": 30.0})
    events = read_events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(1, "x", 1), (2, "x", 2), (3, "x", 3), (3, "x", 30)]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [0, 3]


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
    with pytest.raises(InputError, match="at byte 22"):
        MetricsWriter(tmp_path, resume_step=1)


def test_a_long_file_is_resumed_from_its_end(tmp_path):
    """What lies before the lines that are dropped is not read: here it would be refused."""
    path = tmp_path / METRICS_FILE
    line = '{"step": 1, "x": 2.0}\n'
    path.write_text("[" * 100_000 + "\n" + line + line.replace("1", "2") + '{"step"')
    MetricsWriter(tmp_path, resume_step=1).close()
    assert path.read_text().endswith("[\n" + line)


def test_an_event_is_not_lost_and_no_file_is_made_without_one(tmp_path):
    """A run that is killed closes nothing; one that was finished writes nothing."""
    writer = MetricsWriter(tmp_path)
    assert not (tmp_path / TENSORBOARD_FOLDER).exists()
    writer.write(1, {"x": 2.0})
    assert [e.step for e in read_events(tmp_path) if e.summary.value] == [1]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        read_metrics(tmp_path / METRICS_FILE)


def test_flops_of_the_7b_model():
    """6.61e9 parameters are in its matrices: 6.74e9 less one embedding table."""
    arch = resolve(llama_7b.get_config()).model
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 4096 * 32_000
    attention = 32 * 4096 * 4096 * 6
    assert model_flops_per_token(arch, 4096) == 6 * matrices + attention


def test_model_flops_are_those_of_every_matrix_product_exactly():
    """Grouped queries, heads wider than D / heads; the traced attention is not causal."""
    layers, width, heads, kv_heads, head_dim, mlp_dim, vocab, length = 2, 48, 4, 2, 16, 80, 96, 32
    shapes = {
        "query": (layers, width, heads * head_dim),
        "key": (layers, width, kv_heads * head_dim),
        "value": (layers, width, kv_heads * head_dim),
        "output": (layers, heads * head_dim, width),
        "gate": (layers, width, mlp_dim),
        "up": (layers, width, mlp_dim),
        "down": (layers, mlp_dim, width),
        "head": (width, vocab),
    }

    def total(weights, x_TxD):
        for l in range(layers):
            q, k, v = (x_TxD @ weights[name][l] for name in ("query", "key", "value"))
            q = q.reshape(length, kv_heads, heads // kv_heads, head_dim)
            k, v = (part.reshape(length, kv_heads, head_dim) for part in (k, v))
            scores = jnp.einsum("tkgh,skh->kgts", q, k)
            mixed = jnp.einsum("kgts,skh->tkgh", scores, v).reshape(length, heads * head_dim)
            x_TxD = mixed @ weights["output"][l]
            x_TxD = (x_TxD @ weights["gate"][l] + x_TxD @ weights["up"][l]) @ weights["down"][l]
        return (x_TxD @ weights["head"]).sum()

    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    inputs = jax.ShapeDtypeStruct((length, width), jnp.float32)
    traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(weights, inputs)
    counted = 0
    for product in traced.jaxpr.eqns:
        if product.primitive.name == "dot_general":
            (contracted, _), _ = product.params["dimension_numbers"]
            depth = math.prod(product.invars[0].aval.shape[axis] for axis in contracted)
            counted += 2 * depth * math.prod(product.outvars[0].aval.shape)
    model = Architecture(
        layers=layers,
        embed_dim=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        vocab_size=vocab,
        vocab_padding=0,
        tied_head=False,
        rope_base=10_000.0,
        rope_scaling_factor=1.0,
        rope_scaling_low_turns=1.0,
        rope_scaling_high_turns=4.0,
        rope_scaling_original_length=8192,
        norm_epsilon=1e-5,
        tp_shards=1,
        sync_factors=((1.0, 1.0),) * layers,
    )
    causal_half = 6 * layers * heads * head_dim * length
    assert model_flops_per_token(model, length) + causal_half == counted / length


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


def test_a_measurement_starts_the_next_interval():
    now = [0.0]
    throughput = Throughput(0, 10, flops_per_token=1.0, peak_flops=None, clock=lambda: now[0])
    now[0] = 4.0
    throughput.measure(1)
    now[0] = 5.0
    assert throughput.measure(2) == {"step_time_ms": 1000.0, "tokens_per_second": 10.0}
