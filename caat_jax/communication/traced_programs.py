"""What a traced program computes and communicates, counted from its jaxpr.

Nothing is compiled, and tracing needs no devices (`sharding.abstract_mesh`).  Counted are matrix
products, kernels that state their own cost, and collectives, times the rounds of the loops around
them.  Shapes are as traced: one device's inside `jax.shard_map`, the whole array's outside.

What cannot be counted is not passed over: `Operations.unrecognised` says so in words.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core

from caat_jax.communication import collectives
from caat_jax.communication.collectives import Collective

_KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_gather_reduced": "all-gather",
    "unreduced_psum": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "unreduced_reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
# They name mesh axes and move nothing.
_SILENT = ("axis_index", "pvary", "preduced", "vary_unreduced_cast_p")
# They compute products, and their jaxprs do not say how many.
_OPAQUE = (
    "conv_general_dilated",
    "cudnn_fusion",
    "dot_product_attention",
    "ffi_call",
    "ragged_dot",
    "scaled_matmul",
)


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """A matrix product, or a kernel that states its cost."""

    flops: float  # of one execution; a multiplication and an addition are two
    bytes: float  # of its operands and its result, each once
    times: int  # how often it runs in one execution of the program
    name: str  # the scopes it was traced in


@dataclasses.dataclass(frozen=True)
class Operations:
    """Everything counted in one program."""

    products: tuple[MatrixProduct, ...]
    collectives: tuple[Collective, ...]
    unrecognised: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Of all products, loops included."""
        return sum(product.times * product.flops for product in self.products)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, loops included."""
        return sum(c.times * c.wire_bytes for c in self.collectives)


def count(program: core.Jaxpr | core.ClosedJaxpr) -> Operations:
    """The operations of a program, as `jax.jit(...).trace(...).jaxpr` has it."""
    counted = list(_walk(_open(program), _Where("", 1, {})))

    def of(kind: type) -> tuple:
        return tuple(item for item in counted if isinstance(item, kind))

    return Operations(of(MatrixProduct), of(Collective), tuple(dict.fromkeys(of(str))))


@dataclasses.dataclass(frozen=True)
class _Where:
    """The place of a jaxpr in the program."""

    name: str  # named scopes and transformations, outermost first, as "layers/…"
    times: int  # rounds of the loops around it
    axis_sizes: Mapping[str, int]  # of the mesh it runs on

    def inside(self, equation: core.JaxprEqn) -> "_Where":
        """The place of this equation: its own name stack begins at its jaxpr."""
        own = str(equation.source_info.name_stack)
        return dataclasses.replace(self, name="/".join(filter(None, (self.name, own))))


_Counted = MatrixProduct | Collective | str


def _walk(jaxpr: core.Jaxpr, where: _Where) -> Iterator[_Counted]:
    for equation in jaxpr.eqns:
        yield from _operation(equation, where.inside(equation))


def _operation(equation: core.JaxprEqn, where: _Where) -> Iterator[_Counted]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        yield _matrix_product(equation, where)
    elif name == "pallas_call":
        yield _kernel(params["cost_estimate"], where)
    elif name in _KINDS:
        yield from _collective(equation, where)
    elif name.startswith(_OPAQUE):
        yield f"{name} in {where.name!r}"
    elif name not in _SILENT and _mesh_axes(params, where.axis_sizes):
        yield f"{name} in {where.name!r}: an unknown operation over mesh axes"
    elif name == "cond":
        yield from max((_all(branch, where) for branch in params["branches"]), key=_cost)
    elif name == "while":
        once = [*_all(params["cond_jaxpr"], where), *_all(params["body_jaxpr"], where)]
        if once:
            yield f"while loop in {where.name!r}: rounds unknown, counted as one"
        yield from once
    elif name == "scan":
        rounds = where.times * params["length"]
        yield from _walk(_open(params["jaxpr"]), dataclasses.replace(where, times=rounds))
    else:
        if name == "shard_map":
            where = dataclasses.replace(where, axis_sizes=dict(params["mesh"].shape))
        for inner in _jaxprs(params):
            yield from _walk(inner, where)


def _matrix_product(equation: core.JaxprEqn, where: _Where) -> MatrixProduct:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, right = (variable.aval for variable in equation.invars)
    result = equation.outvars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    moved = sum(_bytes(array) for array in (left, right, result))
    flops = 2.0 * depth * math.prod(result.shape)
    return MatrixProduct(flops, moved, where.times, where.name)


def _kernel(cost: Any, where: _Where) -> MatrixProduct | str:
    if cost is None:
        return f"pallas_call in {where.name!r}: it has no cost_estimate"
    flops, moved = float(cost.flops), float(cost.bytes_accessed)
    return MatrixProduct(flops, moved, where.times, where.name)


def _collective(equation: core.JaxprEqn, where: _Where) -> Iterator[Collective]:
    kind, params = _KINDS[equation.primitive.name], equation.params
    sizes = {axis: where.axis_sizes[axis] for axis in _mesh_axes(params, where.axis_sizes)}
    axes = tuple(axis for axis, size in sizes.items() if size > 1)
    groups = params.get("axis_index_groups")
    group_size = len(groups[0]) if groups else math.prod(sizes.values())
    if group_size == 1:
        return
    whole = equation.outvars if kind == "all-gather" else equation.invars
    arrays = tuple((v.aval.dtype.name, tuple(v.aval.shape)) for v in whole)
    place = collectives.place(where.name, kind, axes)
    yield Collective(kind, axes, group_size, place, arrays, where.times)


def _mesh_axes(params: Mapping[str, Any], axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that an equation names; `axes` of other equations are positions in an array."""
    named = params.get("axes", params.get("axis_name", ()))
    named = named if isinstance(named, tuple) else (named,)
    return tuple(axis for axis in named if axis in axis_sizes)


def _all(jaxpr: core.ClosedJaxpr, where: _Where) -> list[_Counted]:
    return list(_walk(_open(jaxpr), where))


def _cost(counted: Sequence[_Counted]) -> tuple[float, float]:
    """FLOPs, then bytes on the wire; branches that compute nothing are told apart by the latter."""
    flops = sum(item.times * item.flops for item in counted if isinstance(item, MatrixProduct))
    wire = sum(item.times * item.wire_bytes for item in counted if isinstance(item, Collective))
    return flops, wire


def _jaxprs(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs among an equation's parameters: what calls and transformations run."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield _open(item)


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _bytes(array: Any) -> int:
    return collectives.array_bytes(array.dtype.name, array.shape)
