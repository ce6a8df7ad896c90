"""The mesh, and the one table that lays every array out on it.

Arrays name their axes logically ("heads", "batch"); `LOGICAL_AXIS_RULES` says which mesh axes each
name is split over.  Everything else is derived from it: how parameters are stored, the specs at the
boundary of `jax.shard_map`, what is gathered before use, and which axes a gradient is summed over.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from caat_jax.config.sections import MeshConfig
from caat_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "model")

# The name of a place, as in `caat_jax.model.scopes`.
GRADIENT_REDUCTION = "gradient_reduction"

LOGICAL_AXIS_RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "sequence": (),
    "shards": ("model",),  # one residual stream for every tensor-parallel shard
    "residual": (),  # its D channels
    # parameters
    "layers": (),
    "vocab": ("model",),
    "vocab_rows": ("fsdp",),  # of the look-up table, of which each shard has some channels:
    "channels": ("model",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "shared_kv_heads": (),  # fewer than shards: every device has all, and uses those of its shards
    "mlp": ("model",),
    "embed": ("fsdp",),  # D as an axis of a weight: stored in parts, gathered before use
    "head_dim": (),
    "norm": (),
    # inference
    "cache_rows": ("model", "data", "fsdp"),  # heads times sequences, each split as above
    "unsplit": (),  # an axis of the weights for inference, which are whole but for the shards
}


def partition_spec(logical_axes: tuple[str, ...]) -> P:
    """The `PartitionSpec` of an array with these logical axes.

    Raises:
      ValueError: a name is not in the table, or two axes map to one mesh axis.
    """
    unknown = [name for name in logical_axes if name not in LOGICAL_AXIS_RULES]
    if unknown:
        raise ValueError(f"no rule for logical axis {unknown[0]!r}; add it to LOGICAL_AXIS_RULES")
    mesh_axes = [axis for name in logical_axes for axis in LOGICAL_AXIS_RULES[name]]
    if len(set(mesh_axes)) != len(mesh_axes):
        raise ValueError(f"{logical_axes} would use a mesh axis twice: {mesh_axes}")
    return P(*(LOGICAL_AXIS_RULES[name] or None for name in logical_axes))


def without_fsdp(spec: P) -> P:
    """The same layout, but whole over `fsdp`."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in spec)
    return P(*(tuple(a for a in axes if a not in (None, "fsdp")) or None for axes in entries))


def create_mesh(sizes: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh (`data`, `fsdp`, `model`) over these devices, all of this job's by default.

    `model` is the innermost axis: on TPUs and within a GPU host it gets the fastest links.  Where
    there are several TPU slices, `data` spans them, since it communicates once a step.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    shape = tuple(getattr(sizes, axis) for axis in MESH_AXES)
    devices = jax.devices() if devices is None else devices
    if math.prod(shape) != len(devices):
        raise InputError(f"a mesh of {shape} needs {math.prod(shape)} devices, not {len(devices)}")
    slices = len({_slice(device) for device in devices})
    if sizes.data % slices:
        raise InputError(
            f"mesh.data={sizes.data} does not span the {slices} TPU slices;"
            f" it must be a multiple of {slices}"
        )
    # A TPU torus of 4x4x4 takes an axis of 8 only when one of its own is split.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes.data // slices, *shape[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(sizes: MeshConfig) -> AbstractMesh:
    """The same mesh without devices: enough to trace a program, too little to run it."""
    shape = tuple(getattr(sizes, axis) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def platform(mesh: Mesh | AbstractMesh) -> str:
    """That of the mesh's devices, which may be other than JAX's default; "cpu" without devices."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "cpu"


def _slice(device: jax.Device) -> int:
    """The TPU slice of a device: 0 where there is only one, and on other platforms."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def named_shardings(mesh: Mesh | AbstractMesh, specs: Any) -> Any:
    """A tree of `NamedSharding`s from a tree of `PartitionSpec`s."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )


def shapes_on_mesh(shapes: Any, shardings: Any) -> Any:
    """A tree of `ShapeDtypeStruct`s with layouts, from shapes and types without."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
    )


def data_parallel_size(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXIS_RULES["batch"])


def batch_sharding(mesh: Mesh | AbstractMesh, axes: int = 2) -> NamedSharding:
    """How a batch of token sequences [B, T + 1] lies on the mesh; `axes` 1: one number of each."""
    return NamedSharding(mesh, partition_spec(("batch", "sequence")[:axes]))


def over_mesh(
    function: Callable, mesh: Mesh | AbstractMesh, dtype: str, *, in_specs: Any, out_specs: Any
) -> Callable:
    """`function` of each device's parts, as a function of whole arrays: `jax.shard_map`.

    Args:
      function: what runs on each device.
      mesh: the function is manual over all of its axes.
      dtype: that of the matrix products.
      in_specs: how each argument is split.
      out_specs: how the results are.
    """
    # By default, TPUs and GPUs multiply float32 matrices in a shorter type, and TPUs then sum
    # over `model` in bfloat16 too.
    precision = "float32" if dtype == "float32" else None

    def in_precision(*arguments: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*arguments)

    return jax.shard_map(in_precision, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


# What follows is called inside `jax.shard_map` over the whole mesh.


def gather(weight: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
    """The whole of a weight that is stored in parts over `fsdp`; its transpose reduce-scatters."""
    if lax.axis_size("fsdp") == 1:
        return weight
    for position, name in enumerate(logical_axes):
        if "fsdp" in LOGICAL_AXIS_RULES[name]:
            weight = lax.all_gather(weight, "fsdp", axis=position, tiled=True)
    return weight


def mark_varying(parameters: Any, specs: Any) -> Any:
    """Marks every leaf as varying over all mesh axes.

    Derivatives with respect to the result are the devices' own, not yet summed over anything, so
    that `sum_gradients` can add them up once, after the layer loop and the accumulation loop.
    """
    return jax.tree.map(
        lambda leaf, spec: lax.pcast(leaf, _replicated_axes(spec), to="varying"), parameters, specs
    )


def sum_gradients(gradients: Any, specs: Any) -> Any:
    """Sums each gradient over the mesh axes that its parameter is replicated over."""
    with jax.named_scope(GRADIENT_REDUCTION):
        return jax.tree.map(lambda g, spec: lax.psum(g, _replicated_axes(spec)), gradients, specs)


def _replicated_axes(spec: P) -> tuple[str, ...]:
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    split_over = {axis for entry in entries for axis in entry}
    return tuple(axis for axis in MESH_AXES if axis not in split_over)
