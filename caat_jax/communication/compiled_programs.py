"""Reads which collectives a compiled program runs, how often, and over which devices.

The text is XLA's: `jax.stages.Compiled.as_text()`, a scheduled HLO module.  What the reader
does not recognise is in `Reading.unrecognised`, never left out in silence.
"""

import dataclasses
import math
import re

from caat_jax.communication.collectives import KINDS
from caat_jax.communication.hlo_module import Instruction, Module, device_groups, element_types

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
    "AssumeGatherIndicesInBound",
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

# Attributes that name the computations an operation runs, once each.
_CALLS = ("calls", "to_apply", "called_computations")
# Operations that take no time, or hardly any.
_FREE = ("get-tuple-element", "tuple", "bitcast", "constant", "parameter")

_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True)
class CompiledCollective:
    """One collective operation of a compiled program.

    `arrays` are those that are whole on every device of a group, as in `collectives.Collective`;
    the numbers in `groups` are places in the program's order of devices (a permutation's groups
    are its pairs of source and target).  `between` are the operations that are scheduled between
    the start and the end of an asynchronous one.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    name: str
    asynchronous: bool = False
    between: tuple[str, ...] = ()


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
    return Reading(tuple(walk.collectives), tuple(dict.fromkeys(lines + walk.problems)))


class _Walk:
    """Goes through everything a module runs, and notes the collectives it meets."""

    def __init__(self, module: Module):
        self.module = module
        self.collectives: list[CompiledCollective] = []
        self.problems: list[str] = []

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
        called = instruction.called(*_CALLS)
        if opcode == "while":
            trips = _trip_count(self.module, computation, instruction)
            if trips is None:
                self.problems.append(f"loop {instruction.name}: how often it runs; counted as once")
            for name in instruction.called("body", "condition"):
                self.run(name, times * (1 if trips is None else trips))
        elif opcode in KINDS:
            self._collect((computation, instruction), computation, instruction, times)
        elif opcode == "async-start" or opcode.removesuffix("-start") in KINDS:
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
        elif re.sub("-(start|update|done)$", "", opcode) not in (*_LOCAL, *KINDS, "async"):
            self.problems.append(f"operation {opcode}: it may communicate")

    def _visit_start(self, computation: str, start: Instruction, times: int) -> None:
        """The start of an asynchronous operation, which may be wrapped in its own computation."""
        end = _end(self.module.computations[computation], start)
        if end is None:
            self.problems.append(f"{start.name}: where it ends")
        between = self._between(computation, start.name, end) if end else ()
        if start.opcode != "async-start":
            self._collect((computation, start), computation, start, times, between)
            return
        for name in start.called(*_CALLS):
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
        self.collectives.append(
            CompiledCollective(
                "all-reduce",
                tuple(tuple(range(i, slices * devices, devices)) for i in range(devices)),
                tuple(element_types(transfer.result)[:1]),  # of (what is sent, context, token)
                times,
                self._name(computation, transfer),
                True,
                self._between(computation, transfer.name, end),
            )
        )

    def _collect(
        self,
        scheduled: tuple[str, Instruction],
        defined_in: str,
        instruction: Instruction,
        times: int,
        between: tuple[str, ...] | None = None,
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
        if kind == "reduce-scatter":
            # What each device brings, in the type of the result: an operand may be narrower.
            operands = [self.module.computations[defined_in][o] for o in instruction.operands]
            arrays = [
                (dtype, shape)
                for (dtype, _), operand in zip(arrays, operands, strict=True)
                for _, shape in element_types(operand.result)
            ]
        elif kind != "all-reduce" and instruction.opcode != kind:
            count = len(instruction.operands)
            arrays = arrays[count : 2 * count]  # of (operands, results, contexts)
        groups = device_groups(instruction, self.module.devices)
        if groups is None or not arrays or any(dtype is None for dtype, _ in arrays):
            self.problems.append(f"{instruction.opcode} {instruction.name}: its devices or arrays")
            return
        if any(len(group) > 1 for group in groups):
            self.collectives.append(
                CompiledCollective(
                    kind,
                    groups,
                    tuple(arrays),
                    times,
                    instruction.op_name or self._name(*scheduled),
                    between is not None,
                    between or (),
                )
            )

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

    def _between(self, computation: str, start: str, end: str) -> tuple[str, ...]:
        """What is scheduled between two instructions: products by that name, else the opcode."""
        instructions = self.module.computations[computation]
        names = list(instructions)
        inside = [instructions[n] for n in names[names.index(start) + 1 : names.index(end)]]
        return tuple(
            "matrix product" if self._has_product(i) else i.opcode
            for i in inside
            if i.opcode not in _FREE
        )

    def _has_product(self, instruction: Instruction) -> bool:
        if instruction.opcode in ("dot", "convolution"):
            return True
        return instruction.opcode == "fusion" and any(
            self._has_product(inner)
            for name in instruction.called(*_CALLS)
            for inner in self.module.computations[name].values()
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
        for name in instruction.called(*_CALLS):
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


def _trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often a loop runs: as XLA notes it, or from its counter's start, step and bound."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    (body,), (condition,) = loop.called("body"), loop.called("condition")
    test = _root(module.computations[condition])
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    counter = _source(module.computations[condition], test.operands[0])
    bound = _constant(module, condition, test.operands[1])
    if counter.opcode != "get-tuple-element" or bound is None:
        return None
    index = int(counter.attribute("index"))
    initial = _tuple_element(module.computations[computation], loop.operands[0], index)
    step = _tuple_element(module.computations[body], _root(module.computations[body]).name, index)
    if initial is None or step is None:
        return None
    start = _constant(module, computation, initial)
    addition = _source(module.computations[body], step)
    if start is None or addition.opcode != "add":
        return None
    steps = [_constant(module, body, operand) for operand in addition.operands]
    if steps.count(None) != 1:
        return None
    increment = next(step for step in steps if step is not None)
    return max(0, math.ceil((bound - start) / increment)) if increment > 0 else None


def _constant(module: Module, computation: str, name: str) -> int | None:
    """The integer that an instruction stands for, also where a loop only carries it along."""
    instruction = _source(module.computations[computation], name)
    if instruction.opcode == "constant":
        return (
            int(instruction.operands[0])
            if re.fullmatch(r"-?\d+", instruction.operands[0])
            else None
        )
    if instruction.opcode != "get-tuple-element" or computation not in module.callers:
        return None
    instructions, index = module.computations[computation], int(instruction.attribute("index"))
    if _source(instructions, instruction.operands[0]).opcode != "parameter":
        return None
    outer, loop = module.callers[computation]
    (body,) = loop.called("body")
    after = module.computations[body]
    carried = _tuple_element(after, _root(after).name, index)
    carried = carried and _source(after, carried)
    unchanged = (
        carried
        and carried.opcode == "get-tuple-element"
        and carried.attribute("index") == str(index)
        and _source(after, carried.operands[0]).opcode == "parameter"
    )
    initial = _tuple_element(module.computations[outer], loop.operands[0], index)
    return _constant(module, outer, initial) if unchanged and initial else None


def _source(instructions: dict[str, Instruction], name: str) -> Instruction:
    """The instruction of this name, or what it is a copy of."""
    instruction = instructions[name]
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start", "opt-barrier"):
        instruction = instructions[instruction.operands[0]]
    return instruction


def _tuple_element(instructions: dict[str, Instruction], name: str, index: int) -> str | None:
    made = _source(instructions, name)
    return made.operands[index] if made.opcode == "tuple" else None


def _root(instructions: dict[str, Instruction]) -> Instruction:
    return next(i for i in instructions.values() if i.root)
