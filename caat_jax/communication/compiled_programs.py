"""Reads which collectives a compiled program runs, how often, and over which devices.

The text is XLA's: `jax.stages.Compiled.as_text()`, a scheduled HLO module.  What the reader
does not recognise is in `Reading.unrecognised`, never left out in silence.
"""

import collections
import dataclasses
import re

from caat_jax.communication import loops, products
from caat_jax.communication.collectives import KINDS
from caat_jax.communication.hlo_module import (
    CALLS,
    Instruction,
    Module,
    device_groups,
    element_types,
)

# Operations that never leave a device.  All others are either handled below or reported.
_LOCAL = frozenset(
    """
    abs add add-dependency after-all and atan2 batch-norm-grad batch-norm-inference
    batch-norm-training bitcast bitcast-convert broadcast cbrt ceil cholesky clamp clz compare
    complex concatenate constant convert convolution copy cosine divide domain
    dot dynamic-reshape dynamic-slice dynamic-update-slice erf exponential exponential-minus-one fft
    floor gather get-dimension-size get-tuple-element imag iota is-finite log log-plus-one logistic
    map maximum minimum multiply negate not opt-barrier optimization-barrier or pad parameter
    partition-id popcnt power real reduce reduce-precision reduce-window remainder replica-id
    reshape reverse rng rng-bit-generator rng-get-and-update-state round-nearest-afz
    round-nearest-even rsqrt scatter select select-and-scatter set-dimension-size
    shift-left shift-right-arithmetic shift-right-logical sign sine slice sort sqrt
    stochastic-convert subtract tan tanh topk transpose triangular-solve tuple xor
    ragged-dot scaled-dot
    """.split()
)

# Custom calls that are known to stay on their device, by target or its beginning.
_LOCAL_CUSTOM_CALLS = (
    "AllocateBuffer",
    "PrepareAsyncCall",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
    "ConcatBitcast",
    "Sharding",
    "SliceId",
    "ZeroCrop",
    "SPMD",  # full to shard shape and back
    "TopK",
    "tpu_custom_call",  # Pallas kernels; those of this project do not communicate
    "__cublas",
    "__cudnn",
    "__onednn",
    "xla_cpu",
    "__triton",
    "annotate_device_placement",
    "lapack_",
)

# What a transfer between TPU slices has in its attributes.
_MEGASCALE = "xla_megascale_runtime"

# Operations that take no time, or hardly any.
_FREE = ("get-tuple-element", "tuple", "bitcast", "constant", "parameter")

# The start of an operation in a computation, or on a thread, of its own.
_WRAPPED = ("async-start", "call-start")
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class CompiledCollective:
    """One collective operation of a compiled program.

    `arrays` are those that are whole on every device of a group, as in `collectives.Collective`;
    the numbers in `groups` are places in the program's order of devices (a permutation's groups
    are its pairs of source and target).  `between` are the operations that are scheduled between
    the start and the end of an asynchronous one, `overlapped_flops` those of its products: of a
    product beside n operations of the same groups, which share their links, a part of 1/n.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    name: str
    asynchronous: bool = False
    between: tuple[str, ...] = ()
    overlapped_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Between:
    """What is scheduled between two instructions."""

    labels: tuple[str, ...] = ()  # "matrix product" for products and attention, else the opcode
    products: tuple[tuple[str, float], ...] = ()  # names and FLOPs of those


@dataclasses.dataclass(frozen=True)
class Reading:
    """All collectives that join devices, and a line about everything unrecognised."""

    collectives: tuple[CompiledCollective, ...]
    unrecognised: tuple[str, ...]


def read(text: str) -> Reading:
    """Reads a compiled program.

    Raises:
      ValueError: the text is no HLO module.
    """
    module = Module(text)
    if module.entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY")
    walk = _Walk(module)
    walk.run(module.entry, 1)
    lines = [f"the line {line}" for line in module.unrecognised]
    return Reading(walk.finished(), tuple(dict.fromkeys(lines + walk.problems)))


class _Walk:
    """Goes through everything a module runs, and notes the collectives it meets."""

    def __init__(self, module: Module):
        self.module = module
        self.collectives: list[tuple[CompiledCollective, _Between]] = []
        self.problems: list[str] = []

    def finished(self) -> tuple[CompiledCollective, ...]:
        """All collectives met, once nothing is left that could share a product with one."""
        sharing = collections.Counter(
            (name, found.groups)
            for found, between in self.collectives
            for name, _ in between.products
        )
        return tuple(
            dataclasses.replace(
                found,
                overlapped_flops=sum(
                    flops / sharing[name, found.groups] for name, flops in between.products
                ),
            )
            for found, between in self.collectives
        )

    def run(self, computation: str, times: int) -> None:
        """A computation that runs so many times, and all that it calls."""
        chains = _chains(self.module, computation)
        chained = {fusion.name for steps in chains for fusion, _ in steps}
        for instruction in self.module.computations[computation].values():
            if instruction.name not in chained:
                self._visit(computation, instruction, times)
        for steps in chains:
            # The fusions of a chain carry out one collective between them: begun in the first,
            # ended in the last.
            first, inner = steps[0]
            between = self._between(computation, first.name, steps[-1][0].name)
            self._collect((computation, first), inner[0], inner[1], times, between)

    def _visit(self, computation: str, instruction: Instruction, times: int) -> None:
        opcode = instruction.opcode
        called = instruction.called(*CALLS)
        if opcode == "while":
            trips = loops.trip_count(self.module, computation, instruction)
            if trips is None:
                self.problems.append(f"loop {instruction.name}: how often it runs; counted as once")
            for name in instruction.called("body", "condition"):
                self.run(name, times * (1 if trips is None else trips))
        elif opcode in KINDS:
            self._collect((computation, instruction), computation, instruction, times)
        elif opcode in _WRAPPED or opcode.removesuffix("-start") in KINDS:
            self._visit_start(computation, instruction, times)
        elif opcode == "conditional":
            before = len(self.collectives)
            for name in instruction.called(*_BRANCHES):
                self.run(name, times)
            if len(self.collectives) > before:
                self.problems.append(
                    f"{instruction.name}: which branch runs; the collectives of all are counted"
                )
        elif opcode == "custom-call":
            target = (instruction.attribute("custom_call_target") or "").strip('"')
            if not target.startswith(_LOCAL_CUSTOM_CALLS):
                self.problems.append(f"custom call to {target}: it may communicate")
        elif opcode == "fusion" and called[0].startswith("all-reduce-scatter"):
            # The TPU compiler's way to write a reduce-scatter: one fusion of reduce and slice.
            for inner in self.module.computations[called[0]].values():
                if inner.opcode == "all-reduce":
                    reduction = dataclasses.replace(inner, opcode="reduce-scatter")
                    self._collect((computation, instruction), called[0], reduction, times)
        elif opcode in ("fusion", "call"):
            for name in called:
                self.run(name, times)
        elif _MEGASCALE in instruction.attributes:
            self._visit_megascale(computation, instruction, times)
        elif re.sub("-(start|update|done)$", "", opcode) not in (*_LOCAL, *KINDS, "async", "call"):
            self.problems.append(f"operation {opcode}: it may communicate")

    def _visit_start(self, computation: str, start: Instruction, times: int) -> None:
        """The start of an asynchronous operation, which may be wrapped in its own computation."""
        end = _end(self.module.computations[computation], start)
        if end is None:
            self.problems.append(f"{start.name}: where it ends")
        between = self._between(computation, start.name, end) if end else _Between()
        if start.opcode not in _WRAPPED:
            self._collect((computation, start), computation, start, times, between)
            return
        for name in start.called(*CALLS):
            for inner in self.module.computations[name].values():
                if inner.opcode in KINDS:
                    self._collect((computation, start), name, inner, times, between)
                else:
                    self._visit(name, inner, times)

    def _visit_megascale(self, computation: str, transfer: Instruction, times: int) -> None:
        """A part of a reduction between TPU slices: send, receive, and the ends of both.

        The runtime sums what all slices send; "{1,2}x{0:63}" are two slices of 64 devices.
        """
        if transfer.opcode != "send":
            return
        target = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"', transfer.attributes)
        if not target or '_xla_megascale_transfer_type="ALL_REDUCE"' not in transfer.attributes:
            self.problems.append(f"{transfer.name}: a transfer between slices")
            return
        slices, devices = len(target[1].split(",")), int(target[2]) + 1
        end = _end(self.module.computations[computation], transfer) or transfer.name
        between = self._between(computation, transfer.name, end)
        found = CompiledCollective(
            "all-reduce",
            tuple(tuple(range(i, slices * devices, devices)) for i in range(devices)),
            tuple(element_types(transfer.result)[:1]),  # of (what is sent, context, token)
            times,
            self._name(computation, transfer),
            True,
            between.labels,
        )
        self.collectives.append((found, between))

    def _collect(
        self,
        scheduled: tuple[str, Instruction],
        defined_in: str,
        instruction: Instruction,
        times: int,
        between: _Between | None = None,
    ) -> None:
        """Adds one collective.

        Args:
          scheduled: the computation that runs it, and what stands for it there.
          defined_in: the computation of the collective itself.
          instruction: the collective.
          times: how often it runs.
          between: what runs meanwhile; None for one that is not asynchronous.
        """
        kind = instruction.opcode.removesuffix("-start")
        arrays = element_types(instruction.result)
        if kind != "all-reduce" and instruction.opcode != kind:
            count = len(instruction.operands)
            arrays = arrays[count : 2 * count]  # of (operands, results, contexts)
        if kind == "reduce-scatter":
            # What each device brings, in the type of the result: an operand may be narrower.
            operands = [self.module.computations[defined_in][o] for o in instruction.operands]
            arrays = [
                (dtype, shape)
                for (dtype, _), operand in zip(arrays, operands, strict=True)
                for _, shape in element_types(operand.result)
            ]
        groups = device_groups(instruction, self.module.devices)
        if groups is None or not arrays or any(dtype is None for dtype, _ in arrays):
            self.problems.append(f"{instruction.opcode} {instruction.name}: its devices or arrays")
            return
        if any(len(group) > 1 for group in groups):
            found = CompiledCollective(
                kind,
                groups,
                tuple(arrays),
                times,
                instruction.op_name or self._name(*scheduled),
                between is not None,
                between.labels if between else (),
            )
            self.collectives.append((found, between or _Between()))

    def _name(self, computation: str, instruction: Instruction) -> str:
        """The scopes of an instruction; of what it reads, or of its loop, where it has none."""
        instructions = self.module.computations[computation]
        nearest = [instruction]
        for current in nearest:  # grows as it goes
            if current.op_name:
                return current.op_name
            read = [instructions[name] for name in current.operands if name in instructions]
            nearest += [i for i in read if i not in nearest]
        return (
            self._name(*self.module.callers[computation])
            if computation in self.module.callers
            else ""
        )

    def _between(self, computation: str, start: str, end: str) -> _Between:
        """What is scheduled between two instructions of a computation."""
        instructions = self.module.computations[computation]
        names = list(instructions)
        inside = [
            (i, products.flops(self.module, computation, i))
            for name in names[names.index(start) + 1 : names.index(end)]
            if (i := instructions[name]).opcode not in _FREE
        ]
        return _Between(
            tuple("matrix product" if flops else i.opcode for i, flops in inside),
            tuple((i.name, flops) for i, flops in inside if flops),
        )


def _chains(module: Module, computation: str) -> list[list]:
    """The fusions of a schedule that carry out parts of one collective together.

    The TPU compiler's "async collective fusions" run a collective beside the operations that they
    hold; a `chain_id` tells which belong together.  A chain is its fusions in order, each with the
    computation and the instruction of the collective in it; a fusion can be in several.
    """
    chains: dict[str, list] = {}
    for instruction in module.computations[computation].values():
        if instruction.opcode != "fusion":
            continue
        for name in instruction.called(*CALLS):
            for inner in module.computations[name].values():
                chain = re.search(r'chain_id="(\d+)"', inner.attributes)
                if inner.opcode in KINDS and chain:
                    chains.setdefault(chain[1], []).append((instruction, (name, inner)))
    return list(chains.values())


def _end(instructions: dict[str, Instruction], start: Instruction) -> str | None:
    """The name of the operation that ends an asynchronous one, in the same schedule."""
    handles = {start.name}
    for instruction in instructions.values():
        if handles.intersection(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return instruction.name
            if instruction.opcode.endswith("-update"):
                handles.add(instruction.name)
    return None
