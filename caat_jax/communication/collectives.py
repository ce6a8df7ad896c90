"""One collective operation of a program: what it moves, over which links, where it belongs.

`compiled_programs.py` reads them from compiled programs, `traced_programs.py` from traced ones.
"""

import dataclasses
import math
import re

import jax.numpy as jnp

from caat_jax.devices.sharding import GRADIENT_REDUCTION
from caat_jax.model.scopes import EMBEDDING, HEAD_AND_LOSS, LAYERS

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

PLACES = (
    "embedding",
    "layer forward",
    "layer backward",
    "head and loss",
    "parameter gather",
    "gradient reduction",
    "optimizer and metrics",
)
LAYER_LOOP = ("layer forward", "layer backward")

# One component of a name, "transpose(jvp(layers))": transformations, and the scope inside them.
# Combined operations list theirs as "(name:name)".  "jit(layers)" is a function, not a scope.
_SCOPE = re.compile(r"(?:^|[/:]\(?)((?:transpose\(|jvp\(|vmap\()*)(\w+)(?=\)*(?:[/:]|$))")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation, which may move several arrays at once.

    `arrays` are those that are whole on every device of a group: the result of an all-gather, the
    operand of a reduce-scatter.
    """

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # the mesh axes it runs over
    group_size: int  # devices that take part together
    place: str  # one of PLACES
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) as NumPy names them
    times: int  # how often it runs in one execution of the program
    asynchronous: bool = False  # other operations run between its start and its end
    between: tuple[str, ...] = ()  # those, where the schedule is known
    overlapped_flops: float = 0.0  # of the products and attention kernels among them

    @property
    def payload_bytes(self) -> int:
        """Bytes of `arrays`, once."""
        return sum(array_bytes(dtype, shape) for dtype, shape in self.arrays)

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in one execution, by the ring algorithm.

        With n devices and payload b: b·(n − 1)/n for all-gather, reduce-scatter and all-to-all,
        twice that for all-reduce, b for a permutation.
        """
        if self.kind == "collective-permute":
            return float(self.payload_bytes)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.payload_bytes * (self.group_size - 1) / self.group_size


def place(name: str, kind: str, axes: tuple[str, ...]) -> str:
    """Where an operation belongs, one of PLACES, from the named scopes it was traced in.

    Args:
      name: "…/transpose(jvp(layers))/…/psum": scopes and transformations, outermost first.
      kind: one of KINDS.
      axes: the mesh axes it runs over.
    """
    found = _SCOPE.findall(name)
    scopes = {scope for _, scope in found}
    if GRADIENT_REDUCTION in scopes:
        return "gradient reduction"
    inside = scopes & {EMBEDDING, LAYERS, HEAD_AND_LOSS}
    if not inside:
        return "optimizer and metrics"
    if "model" not in axes:  # within the model, the other axes only split parameters
        return "parameter gather" if kind == "all-gather" else "gradient reduction"
    if inside == {LAYERS}:
        return "layer backward" if ("transpose(jvp(", LAYERS) in found else "layer forward"
    return "embedding" if inside == {EMBEDDING} else "head and loss"


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of one array; `dtype` as NumPy (or ml_dtypes) names it."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize
