"""Compiles the paper's models for TPU pods that need not exist: the table of docs/communication.md.

    python -m benchmarks.paper_pods

Needs the extra `tpu` and 8 GB of memory; takes about 20 minutes on two cores.  Each pod is compiled
four times: at p = 0.5 and 1, with and without rematerialisation.
"""

import dataclasses
import importlib
import sys

import jax
import tqdm

from caat_jax.communication.audit import Audit, audit
from caat_jax.communication.collectives import LAYER_LOOP
from caat_jax.config.resolve import resolve, resolve_mesh
from caat_jax.config.sections import Config, MeshConfig
from caat_jax.devices import chips, sharding, topology
from caat_jax.training.step import Programs


@dataclasses.dataclass(frozen=True)
class Pod:
    """A model on a topology, with the microbatches it takes with and without rematerialisation."""

    config: str
    topology: str
    accumulation: int
    accumulation_without: int
    remat: bool = True  # the variant whose memory and compile time the table shows
    slices: int = 1


PODS = (
    Pod("llama_130m", "v5e:2x4", 4, 4, remat=False),
    Pod("llama_1b", "v5e:8x8", 8, 32),
    Pod("llama_1b", "v5p:4x4x4", 8, 16),
    Pod("llama_7b", "v5p:4x4x4", 16, 32),
    Pod("llama_7b", "v5p:4x4x4", 16, 16, slices=2),
    Pod("llama_7b", "v6e:8x8", 16, 128),
    Pod("llama_7b", "v5e:16x16", 8, 32),
)

HEADER = (
    "| model | pod | mesh | microbatches | compile, s | GiB per device | of the chip's"
    " | layer loop, GB: p = 0.5 / 1 | ratio | ratio, other remat | whole `model`, GB: p = 0.5 / 1"
    " | ratio |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    print(HEADER)
    with tqdm.tqdm(total=4 * len(PODS), unit="program", file=sys.stderr) as bar:
        for pod in PODS:
            print(row(pod, bar), flush=True)


def row(pod: Pod, bar: tqdm.tqdm) -> str:
    """One line of the table."""
    half, full = audits(pod, pod.remat, bar)
    other = audits(pod, not pod.remat, bar)
    problems = {p for found in (half, full, *other) for p in found.unrecognised}
    assert not problems, problems
    devices = topology.devices(pod.topology, pod.slices)
    memory = half.memory_bytes["together"]
    share = memory / chips.by_device_kind(devices[0].device_kind).memory_bytes
    loop = [layer_loop_ratio(*pair) for pair in ((half, full), other)]
    accumulation = pod.accumulation if pod.remat else pod.accumulation_without
    sizes = mesh_of(pod, pod.remat)
    cells = (
        pod.config.removeprefix("llama_").upper(),
        f"{pod.slices} x {pod.topology}" if pod.slices > 1 else pod.topology,
        f"{sizes.data} x {sizes.fsdp} x {sizes.model}",
        accumulation,
        f"{half.compile_seconds:.0f}, {full.compile_seconds:.0f}",
        f"{memory / 2**30:.1f}",
        f"{share:.0%}",
        side_by_side(half, full, LAYER_LOOP),
        loop[0],
        loop[1],
        side_by_side(half, full),
        f"{half.wire_bytes('model') / full.wire_bytes('model'):.4f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def audits(pod: Pod, remat: bool, bar: tqdm.tqdm) -> tuple[Audit, Audit]:
    """The audits at p = 0.5 and at p = 1."""
    found = []
    devices = topology.devices(pod.topology, pod.slices)
    config, sizes = config_of(pod, remat), mesh_of(pod, remat)
    for p in (0.5, 1.0):
        bar.set_description(f"{pod.config} {pod.topology} p = {p}, remat {remat}")
        mesh = sharding.create_mesh(sizes, devices)
        found.append(audit(Programs(config.with_sync_factor(p), mesh)))
        bar.update()
    return tuple(found)


def config_of(pod: Pod, remat: bool) -> Config:
    config = importlib.import_module(f"configs.{pod.config}").get_config()
    config.compute.remat = remat
    config.train.accumulation_steps = pod.accumulation if remat else pod.accumulation_without
    if pod.slices > 1:
        config.mesh.data = pod.slices
    return resolve(config)


def mesh_of(pod: Pod, remat: bool) -> MeshConfig:
    devices = len(topology.devices(pod.topology, pod.slices))
    return resolve_mesh(config_of(pod, remat), devices)


def layer_loop_ratio(half: Audit, full: Audit) -> str:
    """The ratios forward and backward; one number where they are the same."""
    ratios = [
        half.wire_bytes("model", (place,)) / full.wire_bytes("model", (place,))
        for place in LAYER_LOOP
    ]
    return " / ".join(f"{ratio:.6g}" for ratio in dict.fromkeys(ratios))


def side_by_side(half: Audit, full: Audit, *places) -> str:
    sent = [found.wire_bytes("model", *places) / 1e9 for found in (half, full)]
    return " / ".join(f"{each:.4g}" for each in sent)


if __name__ == "__main__":
    main()
