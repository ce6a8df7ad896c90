"""The step-time model against numbers worked out by hand, and its command line."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from caat_jax import figures
from caat_jax.communication import exposure
from caat_jax.communication.audit import Audit
from caat_jax.communication.collectives import Collective
from caat_jax.communication.traced_programs import MatrixProduct, Operations
from caat_jax.config.resolve import resolve_mesh
from caat_jax.devices import chips
from caat_jax.devices.chips import Chip, Link
from caat_jax.errors import InputError
from caat_jax.step_time import model
from caat_jax.step_time import report as step_time_report
from caat_jax.step_time.model import Workload, predict
from caat_jax.training.metrics import model_flops_per_token
from tests import models
from tests.command_line import TINY, assert_refused, run_as_users_do, run_here

# 100 FLOP/s, 10 bytes/s of memory; 4 devices a host.
CHIP = Chip(
    name="slow",
    description="round figures",
    flops=100.0,
    memory_bytes=1000.0,
    memory_rate=10.0,
    domain=4,
    link=Link(bandwidth=8.0, latency=1.0),
    network=Link(bandwidth=2.0, latency=3.0),
    sources=dict.fromkeys(chips.FIGURES, "made up"),
)
CONFIG = models.small_config(mesh=dict(data=2, fsdp=1, model=4))


def collective(kind, axes, size, place, *, floats, times=1):
    return Collective(kind, axes, size, place, (("float32", (floats,)),), times)


# Per device: 2·(300/100 = 3 s > 20/10) + 1·(80/10 = 8 s > 100/100) = 14 s of products.
PRODUCTS = (MatrixProduct(300, 20, 2, "layers"), MatrixProduct(100, 80, 1, "embedding"))
COLLECTIVES = (
    # Over 4 devices of a host: 2·3 hops of 1 s, 2·64·3/4 = 96 bytes at 8: 18 s; twice.
    collective("all-reduce", ("model",), 4, "layer forward", floats=16, times=2),
    # Over 2 hosts: 1 hop of 3 s, 16/2 = 8 bytes at 2: 7 s.
    collective("all-gather", ("data",), 2, "parameter gather", floats=4),
    # 2 hops of 3 s, 2·16/2 = 16 bytes at 2: 14 s.
    collective("all-reduce", ("data",), 2, "gradient reduction", floats=4),
)
WORK = Workload(CONFIG, Operations(PRODUCTS, COLLECTIVES, ()), parameters=5, state_bytes=1000)


def test_quantising_by_hand():
    """24 numbers of float32: 24·(2·4 + 2 + 13/4) and 24·(1 + 4) bytes, twice, at 10 bytes/s."""
    arrays = (("uint8", (4, 6)),)
    collectives = tuple(
        Collective(kind, ("model",), 4, "layer forward", arrays, 2)
        for kind in ("all-to-all", "all-gather")
    )
    work = dataclasses.replace(WORK, operations=Operations((), (*COLLECTIVES, *collectives), ()))
    prediction = predict(work, CHIP)
    assert prediction.quantising == pytest.approx(2 * (24 * 13.25 + 24 * 5) / 10)
    assert prediction.compute == prediction.optimizer + prediction.quantising
    assert prediction.reductions == 36 + 2 * 2 * (3 * 1 + 24 * 3 / 4 / 8)


def test_an_all_to_all_crosses_a_torus():
    """Four devices in a ring: of each one's 64 bytes 16 go two links far, so a link carries 32."""
    ring = Link(bandwidth=8.0, latency=0.0, closes_at=4)
    one = Collective("all-to-all", ("model",), 4, "layer forward", (("uint8", (64,)),), 1)
    assert exposure.transfer_seconds(one, ring) == 32 / 8
    assert exposure.transfer_seconds(one, Link(bandwidth=8.0, latency=0.0)) == 48 / 8


def test_a_step_by_hand():
    prediction = predict(WORK, CHIP)
    assert prediction.products == 14
    assert prediction.optimizer == 8 * 4 * 5 / 10  # 16 s
    assert prediction.compute == 30
    assert prediction.reductions == 36
    assert prediction.overlappable == 21
    assert prediction.exposed(overlap=False) == 57
    assert prediction.exposed(overlap=True) == 36  # 21 s run beside 30 s of compute
    assert (prediction.step(overlap=False), prediction.step(overlap=True)) == (87, 66)
    tokens = 4 * 16
    assert prediction.tokens_per_second(overlap=True) == tokens / 8 / 66
    per_token = model_flops_per_token(CONFIG.model, 16)
    assert prediction.mfu(overlap=False) == pytest.approx(per_token * tokens / 87 / (8 * 100))


def test_a_compiled_schedule_says_what_is_exposed():
    reduction = collective("all-reduce", ("model",), 4, "layer forward", floats=8)
    beside = dataclasses.replace(reduction, overlapped_flops=400)
    gather = collective("all-gather", ("data",), 2, "parameter gather", floats=100)
    schedule = Audit((reduction, beside, gather), (), {}, 0, 0)
    prediction = predict(WORK, CHIP, schedule=schedule)
    alone = exposure.transfer_seconds(reduction, CHIP.link)
    assert prediction.reductions == alone + (alone - 4) + 103
    assert prediction.overlappable == 0


def test_attention_writes_no_scores():
    attention = MatrixProduct(100, 80, 1, "transpose(jvp(layers))/attend")  # 1 s, not 8
    work = dataclasses.replace(WORK, operations=Operations((*PRODUCTS, attention), (), ()))
    assert predict(work, CHIP).products == 15


def test_communication_that_outlasts_compute_shows():
    gather = collective("all-gather", ("data",), 2, "parameter gather", floats=100)
    work = dataclasses.replace(WORK, operations=Operations(PRODUCTS, (gather,), ()))
    prediction = predict(work, CHIP)
    assert prediction.overlappable == 3 + 200 / 2
    assert prediction.exposed(overlap=True) == 103 - 30


def test_efficiency_slows_what_is_bound_by_arithmetic():
    # 300/25 = 12 s twice; 8 s is bound by memory still.
    assert predict(WORK, CHIP, efficiency=0.25).products == 32


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all-reduce", 2 * 7 * 1 + 2 * 7 / 8 * 64 / 8),
        ("all-gather", 7 * 1 + 7 / 8 * 64 / 8),
        ("reduce-scatter", 7 * 1 + 7 / 8 * 64 / 8),
        ("collective-permute", 1 + 64 / 8),
    ],
)
def test_a_collective(kind, seconds):
    operation = collective(kind, ("model",), 8, "head and loss", floats=16)
    assert exposure.transfer_seconds(operation, CHIP.link) == seconds


def test_span():
    mesh = dict(data=2, fsdp=4, model=8)
    spans = [exposure.span(axes, mesh) for axes in (("model",), ("fsdp",), ("data",))]
    assert spans == [8, 32, 64]
    assert exposure.span(("fsdp", "model"), mesh) == 32


def test_memory():
    assert predict(WORK, CHIP).state_fits
    assert not predict(dataclasses.replace(WORK, state_bytes=1001), CHIP).state_fits


def test_workload_of_a_configuration():
    config = models.small_config(mesh=dict(data=2, fsdp=2, model=2), model=dict(sync_factor=0.5))
    work = model.workload(config)
    split = 32 * (64 + 64) + 2 * 32 * ((16 + 8 + 8 + 16) * 4 + 3 * 48)  # over fsdp and model
    assert work.parameters == split // 4 + (2 * 2 + 1) * 32
    assert work.state_bytes == 3 * 4 * work.parameters + 5 * 4  # and five counters
    assert (work.devices, work.tokens, work.shared) == (8, 64, 0.5)


@pytest.fixture(scope="module")
def predictions():
    """p = 1, 0.5 and 0.25 on the table's chips and the slow one."""
    config = models.small_config(
        mesh=dict(fsdp=2, model=4), compute=dict(dtype="bfloat16", remat=True)
    )
    works = [model.workload(config.with_sync_factor(p)) for p in (1.0, 0.5, 0.25)]
    chosen = [*chips.CHIPS[:7], CHIP]
    return [[predict(work, chip) for work in works] for chip in chosen]


def test_less_sharing_communicates_less(predictions):
    for rows in predictions:
        full, half, quarter = rows
        assert full.reductions > half.reductions > quarter.reductions
        assert full.overlappable == half.overlappable == quarter.overlappable
        assert full.compute < half.compute  # more private channels are computed again


def test_table(predictions):
    text = step_time_report.table(predictions, efficiency=0.5)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "8 devices (data 1, fsdp 2, model 4)" in lines[0] and "50%" in lines[0]
    assert [line for line in lines if "DOES NOT FIT" in line]  # into 1,000 bytes
    assert "Left out" in text and "UNRECOGNISED" not in text
    full, half = ([line for line in lines if line.split()[:1] == [p]][-1] for p in ("1", "0.5"))
    assert full.endswith(" 1.00")
    row, first = predictions[-1][1], predictions[-1][0]
    assert float(half.split()[1]) == pytest.approx(1e3 * row.compute, rel=0.01)
    speed_up = first.step(overlap=True) / row.step(overlap=True)
    assert half.split()[-1].startswith(f"{speed_up:.2f}") and speed_up < 0.9


def test_table_says_what_was_unrecognised():
    counted = Operations(PRODUCTS, COLLECTIVES, ("pallas_call in 'layers': it has no cost",))
    rows = [predict(dataclasses.replace(WORK, operations=counted), CHIP)]
    assert "UNRECOGNISED: pallas_call in 'layers'" in step_time_report.table([rows], 1.0)


def test_json(predictions):
    report = json.loads(json.dumps(step_time_report.to_json(predictions, 1.0), allow_nan=False))
    assert report["mesh"] == dict(data=1, fsdp=2, model=4)
    found = report["predictions"][-1]
    assert (found["chip"], found["p"], found["shared_fraction"]) == ("slow", "0.25", 0.25)
    full, row = predictions[-1][0], predictions[-1][-1]
    expected = full.step(overlap=True) / row.step(overlap=True)
    assert found["speed_up"]["all_overlaps"] == expected < 0.9  # bound by compute
    assert found["step"] == {
        "all_overlaps": row.step(overlap=True),
        "nothing_overlaps": row.step(overlap=False),
    }
    assert report["chips"][1]["sources"]["link.bandwidth"].startswith("https://")


def test_picture(predictions, tmp_path):
    output = tmp_path / "step_time.png"
    step_time_report.plot(predictions, output)
    pixels = (matplotlib.image.imread(output)[..., :3] * 255).round().astype(int)
    for colour in figures.COLOURS:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) <= 2).sum() > 300, colour
    with pytest.raises(InputError, match="missing"):
        step_time_report.plot(predictions, tmp_path / "missing" / "a.png")


# ---- The command line -------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A function: arguments -> exit code, stdout, stderr."""
    return lambda *arguments: run_here(("caat_jax/step_time/__main__.py", *arguments), tmp_path)


SMALL = (TINY, "--config.model.vocab_size=64", "--config.compute.dtype=bfloat16", "--devices=8")
OWN = ("--flops=1e12", "--memory_rate=1e11", "--link_bandwidth=1e9", "--link_latency=0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SMALL], ["--chip is missing", "v5p", "--flops"]),
        ([*SMALL, "--topology=v5p"], ["--topology=v5p is not a topology", "v5p:4x4x4"]),
        ([*SMALL, "--chip=v5q"], ["--chip=v5q", "nearest is v5", "gaudi3"]),
        ([*SMALL, "--chip=v5p", "--p=1.5"], ["--p=1.5", "[0, 1]"]),
        ([*SMALL, "--chip=v5p", "--p=-0.1"], ["--p=-0.1", "[0, 1]"]),
        ([*SMALL, "--chip=v5p", "--p=nan"], ["--p=nan", "[0, 1]"]),
        ([*SMALL, "--chip=v5p", "--p=half"], ["half"]),
        ([*SMALL, "--chip=v5p", "--efficiency=0"], ["--efficiency=0", "(0, 1]"]),
        ([*SMALL, *OWN[:2]], ["--link_bandwidth, --link_latency"]),
        ([*SMALL, *OWN[:3], "--link_latency=-1"], ["--link_latency=-1"]),
        ([*SMALL, "--flops=0", *OWN[1:]], ["--flops=0"]),
        ([*SMALL, "--chip=v5p", "--devices=0"], ["--devices=0"]),
        (
            [*SMALL, "--chip=v5p", "--config.mesh.model=4", "--config.mesh.data=3"],
            ["mesh.data=3", "8 devices"],
        ),
        ([*SMALL, "--chip=v5p", "--config.compute.dtype=float32"], ["compute.dtype=float32"]),
        ([TINY, "--devices=8", "--chip=v5p"], ["model.vocab_size=-1"]),
        ([TINY, "--chip=v5p"], ["--devices"]),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_refused(run, arguments, said):
    assert_refused(run(*arguments), *said)


def test_as_users_run_it(tmp_path):
    output = tmp_path / "picture.png"
    arguments = (*SMALL, "--chip=v5p", *OWN, "--p=0.5", f"--output={output}")
    code, stdout, stderr = run_as_users_do("-m", "caat_jax.step_time", *arguments)
    assert code == 0, stderr
    assert "v5p:" in stdout and "own:" in stdout and str(output) in stdout
    assert output.stat().st_size > 10_000
    labels = [line.split()[0] for line in stdout.splitlines() if line.startswith("   ")]
    assert labels == ["p", "1", "0.5"] * 2


@models.needs_gpu_compiler
@pytest.mark.slow
def test_predictions_from_a_compiled_step(run):
    options = ("--topology=h100:1x1x8", "--p=1", "--output=", "--json")
    code, stdout, stderr = run(*SMALL, *options)
    assert code == 0, stderr
    found = json.loads(stdout)
    assert [chip["name"] for chip in found["chips"]] == ["h100-nvlink (compiled)"]
    (row,) = found["predictions"]
    assert 0 < row["exposed"]["all_overlaps"] == row["exposed"]["nothing_overlaps"]


@models.needs_gpu_compiler
def test_a_topology_of_another_size_is_refused(run):
    assert_refused(
        run(*SMALL, "--topology=h100:1x1x4"), "--topology=h100:1x1x4", "4 devices, not 8"
    )


def test_factors_per_sublayer_have_their_row(run):
    factors = "(1, 0.5, (0.5, 0), 0.5)"
    code, stdout, stderr = run(
        *SMALL,
        *OWN,
        "--p=1",
        "--json",
        "--output=",
        f"--config.model.sync_factor_per_layer={factors}",
    )
    assert code == 0, stderr
    rows = json.loads(stdout)["predictions"]
    assert [row["p"] for row in rows] == ["1", "config"]
    assert rows[1]["shared_fraction"] == (2 + 1 + 0.5 + 1) / 8


def test_mesh_of_a_pod_needs_no_devices():
    config = models.small_config(mesh=dict(data=1, fsdp=-1, model=8), global_batch=32)
    mesh = resolve_mesh(config, 256)
    assert model.workload(dataclasses.replace(config, mesh=mesh)).devices == 256
