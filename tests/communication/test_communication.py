"""What compiled training steps communicate, against closed forms and the count of the trace."""

import dataclasses
import functools
import importlib.util
import json
from collections import Counter

import jax
import numpy as np
import pytest

from caat_jax.communication import audit as communication_audit
from caat_jax.communication import (
    collectives,
    compiled_programs,
    exposure,
    loops,
    products,
    report,
    traced_programs,
)
from caat_jax.communication.audit import Audit, audit, audit_program
from caat_jax.communication.collectives import Collective
from caat_jax.communication.compiled_programs import CompiledCollective
from caat_jax.communication.hlo_module import Module
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.devices import chips, sharding, topology
from caat_jax.devices.chips import Link
from caat_jax.errors import InputError
from caat_jax.inference.programs import InferencePrograms
from caat_jax.training.step import Programs
from configs import llama_7b, llama_130m, tiny
from tests import models

MATRICES = 7  # of a layer
RING = 7 / 8  # of a payload goes over each device's wire, for 8 devices


def tiny_config(**compute) -> Config:
    config = tiny.get_config()
    config.compute.update(compute)
    return resolve(config).with_vocabulary(258)


def paper_130m(dtype, *, layers=12, remat=False) -> Config:
    """The paper's 130M on 8 devices, 2 microbatches of 4 sequences."""
    config = llama_130m.get_config()
    config.model.layers = layers
    config.compute.dtype = dtype
    config.compute.remat = remat
    config.train.update(dict(global_batch=8, accumulation_steps=2))
    return resolve(config)


def half_of_130m() -> Config:
    """Half as wide, of two layers, with short sequences and a small vocabulary."""
    config = llama_130m.get_config()
    config.model.update(layers=2, embed_dim=384, heads=8, kv_heads=8, mlp_dim=1024, vocab_size=4096)
    config.data.sequence_length = 256
    config.compute.remat = True
    config.train.update(dict(global_batch=8, accumulation_steps=2))
    return resolve(config)


@functools.cache
def audited(config: Config, p: float, topology_name: str = "") -> Audit:
    devices = topology.devices(topology_name) if topology_name else jax.devices()
    sizes = resolve_mesh(config, len(devices))
    return audit(Programs(config.with_sync_factor(p), sharding.create_mesh(sizes, devices)))


def sent(found: Audit, place: str, kinds=collectives.KINDS) -> tuple[int, float]:
    """How often operations run at a place over `model`, and the bytes that a device sends."""
    those = [c for c in found.collectives if c.place == place and c.kind in kinds]
    assert all(c.axes == ("model",) for c in those)
    return sum(c.times for c in those), sum(c.times * c.wire_bytes for c in those)


def check_layers_and_gather(found: Audit, config: Config, p: float, forward_bytes: int) -> None:
    """The formulae of METHOD.md at M = S = 8: backward is float32, nothing is sent twice."""
    arch, steps = config.model, config.train.accumulation_steps
    tokens = config.train.global_batch * config.data.sequence_length  # of all microbatches
    shared = int(arch.embed_dim * p)
    sublayers = 2 * arch.layers
    assert found.unrecognised == ()
    for place, size in (("layer forward", forward_bytes), ("layer backward", 4)):
        runs, total = sent(found, place)
        assert runs == (sublayers * steps if shared else 0)
        assert total == sublayers * tokens * shared * size * 2 * RING
    gathered = forward_bytes * tokens * arch.embed_dim * RING
    assert sent(found, "embedding", ("all-gather",)) == (steps, gathered)


def check_model_axis(found: Audit, config: Config, p: float, forward_bytes: int) -> None:
    """The rest of it too; TPUs reduce-scatter only parts of at least 128 channels."""
    check_layers_and_gather(found, config, p, forward_bytes)
    arch, steps = config.model, config.train.accumulation_steps
    tokens = config.train.global_batch * config.data.sequence_length
    scattered = 4 * tokens * arch.embed_dim * RING
    assert sent(found, "embedding", ("reduce-scatter",)) == (steps, scattered)
    assert sent(found, "embedding")[0] == 2 * steps
    # One number a token by maximum, two by sum.
    assert sent(found, "head and loss") == (2 * steps, 3 * 4 * tokens * 2 * RING)
    scales = sum(
        np.prod(shape) * c.times
        for c in found.collectives
        if c.place == "gradient reduction"
        for _, shape in c.arrays
    )
    assert scales == (2 * arch.layers + 1) * arch.embed_dim  # γ of all norms, once a step


SCANNED = {"scan_layers": True, "remat": True}


@pytest.mark.parametrize(
    "compute, p",
    [
        ({}, 0.5),
        (SCANNED, 1.0),
        (SCANNED, 0.5),
        (SCANNED, 0.0),
        *(pytest.param({}, p, marks=pytest.mark.slow) for p in (1.0, 0.25, 0.0)),
        pytest.param(SCANNED, 0.25, marks=pytest.mark.slow),
    ],
)
def test_tiny_on_the_simulated_mesh(compute, p):
    config = tiny_config(**compute)
    check_model_axis(audited(config, p), config, p, forward_bytes=4)


def check_quantised(found: Audit, config: Config, p: float, blocks: tuple[int, int]) -> None:
    """(8·b + 16)/(16·b) of bfloat16's bytes for `blocks` of b channels each, in two collectives."""
    arch, steps = config.model, config.train.accumulation_steps
    tokens = config.train.global_batch * config.data.sequence_length
    count, channels = blocks
    in_bfloat16 = tokens * count * channels * 2 * 2 * RING
    share = (8 * channels + 16) / (16 * channels)
    assert 0 <= count * channels - int(arch.embed_dim * p) < count
    assert found.unrecognised == ()
    for place in collectives.LAYER_LOOP:
        for kind in ("all-to-all", "all-gather"):
            runs, total = sent(found, place, (kind,))
            assert runs == 2 * arch.layers * steps
            assert total == pytest.approx(2 * arch.layers * in_bfloat16 * share / 2, rel=1e-12)
        assert sent(found, place)[0] == 2 * runs  # nothing else
    part = arch.embed_dim // 8  # the embedding's blocks lie within a device's channels
    gathered = tokens * arch.embed_dim * (part + 2) / part * RING
    for kind in ("all-gather", "all-to-all"):
        assert sent(found, "embedding", (kind,)) == (steps, gathered)


@pytest.mark.parametrize(
    "p, block, blocks, backward",
    [
        (0.5, 128, (1, 128), "int8"),
        pytest.param(1.0, 100, (3, 86), "float8_e5m2", marks=pytest.mark.slow),
    ],
)
def test_quantised_wires_on_the_simulated_mesh(p, block, blocks, backward):
    config = tiny_config(
        forward_wire_dtype="int8", backward_wire_dtype=backward, wire_block=block, scan_layers=True
    )
    check_quantised(audited(config, p), config, p, blocks)


@models.needs_libtpu
@pytest.mark.slow
def test_quantised_wires_on_a_tpu_pod():
    config = half_of_130m()
    compute = dataclasses.replace(
        config.compute,
        forward_wire_dtype="int8",
        backward_wire_dtype="float8_e5m2",
        wire_block=96,
    )
    config = dataclasses.replace(config, compute=compute)
    check_quantised(audited(config, 0.5, "v5e:2x4"), config, 0.5, (2, 96))


@pytest.mark.parametrize("p", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_130m_on_the_simulated_mesh(p):
    # In float32: XLA's CPU backend reduces bfloat16 as float32.
    config = paper_130m("float32")
    check_model_axis(audited(config, p), config, p, forward_bytes=4)


def check_on_a_tpu_pod(config: Config, p: float) -> None:
    """In bfloat16; backward reductions are float32."""
    found = audited(config, p, "v5e:2x4")
    check_layers_and_gather(found, config, p, forward_bytes=2)
    sent_types = {
        (c.place, dtype)
        for c in found.collectives
        if c.place.startswith("layer")
        for dtype, _ in c.arrays
    }
    assert sent_types == {("layer forward", "bfloat16"), ("layer backward", "float32")}


@models.needs_libtpu
def test_small_model_on_a_tpu_pod():
    """The programs of the 130M model take the compiler four times as long."""
    check_on_a_tpu_pod(half_of_130m(), 0.5)


@models.needs_libtpu
@pytest.mark.slow
def test_tiny_on_a_tpu_pod():
    config = tiny_config(scan_layers=True)
    check_layers_and_gather(audited(config, 0.5, "v5e:2x4"), config, 0.5, forward_bytes=4)


@models.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_130m_on_a_tpu_pod(p, remat):
    check_on_a_tpu_pod(paper_130m("bfloat16", layers=3, remat=remat), p)


@models.needs_libtpu
@pytest.mark.slow
def test_forward_reductions_run_beside_products_only_where_p_is_below_1():
    """At p < 1 at least the product of the private channels can."""
    config = paper_130m("bfloat16", layers=3, remat=True)
    full, half = (
        [
            c.overlapped_flops
            for c in audited(config, p, "v5e:2x4").over("model", ("layer forward",))
        ]
        for p in (1.0, 0.5)
    )
    tokens, private = 4 * 1024, 768 // 2
    # Of 2 heads of 48, and of 256 columns of the MLP.
    attention, mlp = (2 * tokens * width * private for width in (96, 256))
    assert full == [0, 0]
    assert half[0] >= attention and half[1] >= mlp


def total_flops(text: str) -> float:
    """Of all products and attention kernels of a compiled program, its loops counted."""
    module = Module(text)

    def of(computation: str) -> float:
        total = 0.0
        for instruction in module.computations[computation].values():
            if instruction.opcode == "while":
                rounds = loops.trip_count(module, computation, instruction)
                total += rounds * of(*instruction.called("body"))
            else:
                total += products.flops(module, computation, instruction)
        return total

    return of(module.entry)


@models.needs_gpu_compiler
def test_130m_for_gpus_that_are_not_there(monkeypatch):
    texts, read = [], compiled_programs.read
    monkeypatch.setattr(compiled_programs, "read", lambda text: texts.append(text) or read(text))
    config = paper_130m("bfloat16", layers=2, remat=True)
    mesh = sharding.create_mesh(resolve_mesh(config, 8), topology.devices("h100:1x1x8"))
    found = audit(Programs(config, mesh))
    check_layers_and_gather(found, config, 0.5, forward_bytes=2)
    assert all(c.asynchronous for c in found.collectives)
    backward = found.over("model", ("layer backward",))
    assert all(c.overlapped_flops > 0 for c in backward)
    (text,) = texts
    for kernel in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"):
        assert f'custom_call_target="{kernel}"' in text
    # As the program without devices is counted, where attention is written out as products.
    assert total_flops(text) == found.product_flops


@models.needs_gpu_compiler
@pytest.mark.parametrize("p, most", [(0.5, 0.55), pytest.param(1.0, 0.65, marks=pytest.mark.slow)])
def test_one_part_of_a_batch_hides_the_transfers_of_another(p, most):
    """Prefill of 7B: two parts leave exposed at most so much of what one leaves exposed."""
    fields = llama_7b.get_config()
    fields.model.layers = 2
    mesh = sharding.create_mesh(
        MeshConfig(**EIGHT, simulated_devices=0), topology.devices("h100:1x1x8")
    )

    def exposed(parts: int) -> float:
        fields.compute.batch_parts = parts
        config = resolve(fields).with_sync_factor(p)
        found = audit_program(
            lambda mesh: InferencePrograms(config, mesh).trace_prefill(8, 4096), mesh
        )
        reductions = found.over("model", collectives.LAYER_LOOP)
        assert sum(c.times for c in reductions) == 2 * config.model.layers * parts
        return exposure.of_all(reductions, chips.by_name("h100-nvlink"), EIGHT).exposed

    assert exposed(2) < most * exposed(1)


@pytest.mark.slow  # it compiles for TPUs, 15 s each
@pytest.mark.parametrize(
    "name, offloads", [("v5p:2x2x2", True), ("v6e:2x4", True), ("v5e:2x4", False)]
)
def test_sparse_cores_run_the_reductions_of_prefill(name, offloads, monkeypatch):
    texts, read = [], compiled_programs.read
    monkeypatch.setattr(compiled_programs, "read", lambda text: texts.append(text) or read(text))
    config = half_of_130m().with_sync_factor(0.5)
    mesh = sharding.create_mesh(resolve_mesh(config, 8), topology.devices(name))
    found = audit_program(lambda mesh: InferencePrograms(config, mesh).trace_prefill(16, 256), mesh)
    assert found.unrecognised == ()
    assert ('execution_thread="sparsecore"' in texts[0]) == offloads
    if offloads:
        assert all(c.overlapped_flops > 0 for c in found.over("model", collectives.LAYER_LOOP))


@models.needs_gpu_compiler
@pytest.mark.parametrize(
    "name, kind",
    [
        ("h100:1x2x8", "NVIDIA H100 80GB HBM3"),
        ("h200:1x1x8", "NVIDIA H200"),
        ("a100:1x1x4", "NVIDIA A100-SXM4-80GB"),
    ],
)
def test_every_gpu_is_compiled_for(name, kind):
    devices = topology.devices(name)
    assert {device.device_kind for device in devices} == {kind}
    assert chips.by_device_kind(kind) is not None
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    array = jax.ShapeDtypeStruct((len(devices) * 8, 128), "bfloat16", sharding=rows)
    text = jax.jit(lambda a: (a @ a.T).sum()).lower(array).compile().as_text()
    assert "all-" in text


def test_gpus_need_their_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-gpu.txt"):
        topology.devices("h100:1x1x8")


EIGHT = dict(data=1, fsdp=1, model=8)
CHIP = dataclasses.replace(
    chips.by_name("h100-nvlink"), flops=100.0, link=Link(bandwidth=8.0, latency=1.0)
)


@pytest.mark.parametrize(
    "flops, hidden",
    [(0, 0), (1000, 10), (10_000, 28)],  # 14 hops, and 14 s to send 112 bytes
)
def test_exposed_is_what_products_do_not_hide(flops, hidden):
    one = Collective(
        "all-reduce", ("model",), 8, "layer forward", (("float32", (16,)),), 3, True, (), flops
    )
    time = exposure.of_one(one, CHIP, EIGHT)
    assert (time.transfer, time.hidden, time.exposed) == (28, hidden, 28 - hidden)
    both = exposure.of_all([one, one], CHIP, EIGHT)
    assert (both.transfer, both.exposed) == (6 * 28, 6 * (28 - hidden))
    assert exposure.of_one(one, CHIP, EIGHT, efficiency=0.5).hidden == min(28, 2 * hidden)


@models.needs_libtpu
def test_data_spans_tpu_slices():
    devices = topology.devices("v5e:2x2", slices=2)
    mesh = sharding.create_mesh(MeshConfig(2, 1, 4, 0), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.arange(2)[:, None, None]).all()
    with pytest.raises(InputError, match=r"mesh.data=1 does not span the 2 TPU slices"):
        sharding.create_mesh(MeshConfig(1, 2, 4, 0), devices)


@pytest.mark.parametrize(
    "remat, accumulation_steps",
    [
        (False, 1),
        (True, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 2), (True, 1))),
    ],
)
def test_trace_and_compiled_program_agree(remat, accumulation_steps):
    """All that is written down, on a mesh of three axes; the compiler adds sums of scalars."""
    config = models.small_config(
        model=dict(layers=3, tp_shards=8, sync_factor=0.5),
        compute=dict(remat=remat),
        mesh=dict(data=2, fsdp=2, model=2),
        global_batch=8,
        accumulation_steps=accumulation_steps,
    )
    programs = models.programs(config)
    compiled = audit(programs).collectives
    traced = traced_programs.count(programs.trace_train_step().jaxpr).collectives

    def by_place(found):
        totals = {}
        for c in found:
            # XLA for CPUs gathers embedding and head before the accumulation loop, once.
            hoisted = c.place == "parameter gather" and accumulation_steps > 1
            if c.place != "optimizer and metrics" and not hoisted:
                key = (c.axes, c.place, c.kind)
                totals[key] = totals.get(key, 0) + c.times * c.wire_bytes
        return totals

    assert by_place(compiled) == by_place(traced)


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fsdp_gathers_one_layer_at_a_time(remat):
    config = models.small_config(
        model=dict(layers=3, tp_shards=8, sync_factor=0.5),
        compute=dict(remat=remat),
        mesh=dict(data=2, fsdp=2, model=2),
    )
    found = audit(models.programs(config))
    gathers = [c for c in found.collectives if c.place == "parameter gather"]
    in_loop = sum(c.times for c in gathers) - 2  # the embedding and the head are outside
    assert in_loop == (2 if remat else 1) * 3 * MATRICES
    largest = 48 * 32 // 2 * 4  # bytes of an MLP matrix on one shard of two
    head = 64 * 32 // 2 * 4
    assert max(c.payload_bytes for c in gathers) == max(largest, head)
    scattered = [c for c in found.collectives if c.kind == "reduce-scatter" and c.axes == ("fsdp",)]
    assert sum(c.times for c in scattered) == 3 * MATRICES + 2


def test_nothing_is_sent_on_one_device():
    found = audit(models.programs(models.small_config(model=dict(sync_factor=0.5))))
    assert found.collectives == () and found.unrecognised == ()


def test_factors_per_sublayer():
    """Sublayers at 0 send nothing, forward or backward."""
    factors = ((0.25, 0.75), (0.25, 0.75), 0.0, 0.0, (0.0, 0.5), (1.0, 0.0))
    config = models.small_config(
        model=dict(layers=6, tp_shards=8, sync_factor_per_layer=factors), mesh=dict(model=8)
    )
    found = audit(models.programs(config)).over("model", collectives.LAYER_LOOP)
    for place in collectives.LAYER_LOOP:
        sent = Counter()
        for c in found:
            for _, shape in c.arrays if c.place == place else ():
                sent[shape[-1]] += c.times
        assert sent == {8: 2, 24: 2, 16: 1, 32: 1}


@pytest.mark.parametrize(
    "name, place",
    [
        ("jit(f)/jvp(embedding)/psum", "embedding"),
        ("jit(f)/unembedding/psum", "optimizer and metrics"),
        ("jit(layers)/psum", "optimizer and metrics"),
        ("jit(f)/while/body/layers/psum", "layer forward"),
        ("layers", "layer forward"),
        ("jit(f)/transpose(jvp(layers))/while/body/psum", "layer backward"),
        ("jit(f)/transpose(jvp(sublayers))/layers/psum", "layer forward"),
        ("jit(f)/(jvp(head_and_loss)/psum:head_and_loss/pmax)", "head and loss"),
        ("jit(f)/gradient_reduction/psum", "gradient reduction"),
        ("jit(f)/no_gradient_reduction/layers/psum", "layer forward"),
    ],
)
def test_place_by_whole_scopes(name, place):
    assert collectives.place(name, "all-reduce", ("model",)) == place


@pytest.mark.parametrize(
    "groups, axes",
    [
        (((0, 1), (2, 3), (4, 5), (6, 7)), ("model",)),
        (((0, 2), (1, 3), (4, 6), (5, 7)), ("fsdp",)),
        (((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        (((0, 2, 4, 6), (1, 3, 5, 7)), ("data", "fsdp")),
        (((7, 6, 5, 4, 3, 2, 1, 0),), ("data", "fsdp", "model")),
        (((0, 3), (1, 2), (4, 7), (5, 6)), ("fsdp", "model")),
        (((0, 1), (2, 3)), ("model",)),  # of one slice of two
    ],
)
def test_mesh_axes_of_groups(groups, axes):
    mesh = sharding.create_mesh(MeshConfig(2, 2, 2, 0))
    operation = CompiledCollective("all-reduce", groups, (("float32", ()),), 1, "")
    assert communication_audit.mesh_axes(operation, mesh) == axes


def test_report_says_what_was_unrecognised_and_json_has_everything():
    config = tiny_config()
    mesh = sharding.create_mesh(resolve_mesh(config, 8))
    found = dataclasses.replace(audited(config, 0.5), unrecognised=("operation teleport",))
    audits = {"p = 0.5": found, "p = 1.0": audited(config, 1.0)}
    workload = report.training(config)
    text = report.tables(config, mesh, audits, workload)
    assert "UNRECOGNISED in the program at p = 0.5:\n  operation teleport" in text
    assert max(map(len, text.splitlines())) <= 100
    (forward,) = [line.split() for line in text.splitlines() if line.startswith("model  layer f")][
        1:
    ]
    assert forward[-1] == "0.5"
    written = json.loads(json.dumps(report.to_json(mesh, audits, workload)))
    assert len(written["programs"]["p = 0.5"]["collectives"]) == len(found.collectives)


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install -r requirements-tpu.txt"):
        topology.devices("v5e:2x4")


@models.needs_libtpu
@pytest.mark.parametrize(
    "name", ["v5e", "v5e:3x3", "v9z:2x2", "8", "v5e:2x4x4x4", "v5e:0x4", "h900:1x1x8"]
)
def test_unknown_topology_is_refused(name):
    with pytest.raises(InputError, match=rf"--topology={name}.*v5p:4x4x4") as error:
        topology.devices(name)
    assert "\n" not in str(error.value)
