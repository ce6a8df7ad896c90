"""The text of a compiled program, XLA's scheduled HLO, as computations and instructions."""

import dataclasses
import functools
import math
import re

import numpy as np

# XLA's names of element types that differ from NumPy's.
_DTYPES = {
    "pred": "bool",
    **{f"s{bits}": f"int{bits}" for bits in (4, 8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (4, 8, 16, 32, 64)},
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "bf16": "bfloat16",
    "c64": "complex64",
    "c128": "complex128",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}


# Attributes that name the computations an operation runs, once each.
CALLS = ("calls", "to_apply", "called_computations")

# A computation's first line.
_BEGINNING = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
# `[ROOT] %name = type opcode(operands), attributes`: no type has a word right before a bracket.
_INSTRUCTION = re.compile(
    r"\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>\S.*?) (?P<opcode>[a-z][\w\-]*)"
    r"\((?P<operands>.*?)\)(?:, (?P<attributes>.*))?$"
)
# What an attribute may be: a text, groups over a mesh's axes, groups counted through, braces two
# deep, or a word.
_VALUE = (
    r"""("[^"]*"|mesh\[[^\]]*\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))? ?\{[^}]*\}"""
    r"""|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:[^{}]|\{[^{}]*\})*\}|[%\w.\->]+)"""
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation; of a constant, the value is its only operand."""

    name: str
    result: str  # its type, as written
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=` at the top of the attributes."""
        match = re.search(rf"(?:^|, ){name}={_VALUE}", self.attributes)
        return match[1] if match else None

    def integers(self, name: str) -> list[int]:
        """The numbers in an attribute; none where it is missing."""
        return _integers(self.attribute(name) or "")

    @property
    def op_name(self) -> str:
        """The scopes it was traced in."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, *names: str) -> list[str]:
        """The computations that these attributes name."""
        values = [self.attribute(name) or "" for name in names]
        return re.findall(r"%?([\w.\-]+)", " ".join(values))


class Module:
    """The computations of a module by name, each a dictionary of its instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry: str | None = None
        self.unrecognised: list[str] = []
        # A kernel's own metadata has line breaks.
        header, *lines = re.sub(r'\n(?="|}})', " ", text).splitlines()
        # Replicas and partitions: without them, groups that are left empty have no members.
        counts = dict(re.findall(r"(num_partitions|replica_count)=(\d+)", header))
        self.devices = math.prod(int(count) for count in counts.values())
        current: dict[str, Instruction] = {}
        for line in lines:
            if beginning := _BEGINNING.match(line):
                current = self.computations.setdefault(beginning[2], {})
                if beginning[1]:
                    self.entry = beginning[2]
            elif match := _INSTRUCTION.match(line):
                instruction = _instruction(match)
                current[instruction.name] = instruction
            elif line.startswith(" ") and line.strip():
                self.unrecognised.append(line.strip()[:80])

    @functools.cached_property
    def callers(self) -> dict[str, tuple[str, Instruction]]:
        """For the body and condition of every loop: the computation it is in, and the loop."""
        return {
            name: (computation, instruction)
            for computation, instructions in self.computations.items()
            for instruction in instructions.values()
            if instruction.opcode == "while"
            for name in instruction.called("body", "condition")
        }


def device_groups(instruction: Instruction, devices: int) -> tuple[tuple[int, ...], ...] | None:
    """The groups of devices, in any of the ways that XLA writes them; None: in another."""
    if pairs := instruction.attribute("source_target_pairs"):
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs))
    text = instruction.attribute("replica_groups")
    if text is None:
        return None
    if text == "{}":
        return (tuple(range(devices)),)
    if re.fullmatch(r"\{(\{[\d,]*\},?)+\}", text):
        return tuple(
            tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text)
        )
    if match := re.fullmatch(r"\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
        ids = _iota(match[2].removeprefix("<=")).reshape(_integers(match[1]))
        return tuple(map(tuple, ids.tolist()))
    return _mesh_groups(text)


def _mesh_groups(text: str) -> tuple[tuple[int, ...], ...] | None:
    """Groups such as mesh['a'=2,'b'=4], device_ids=([8]T(0)) {'b'}: over some axes of a mesh."""
    match = re.fullmatch(
        r"mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? ?\{([^}]*)\}", text
    )
    if not match:
        return None
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    grouped = re.findall(r"'([^']+)'", match[3])
    if ":" in match[3] or not set(grouped) <= set(sizes):  # parts of an axis
        return None
    count = math.prod(sizes.values())
    ids = (_iota(match[2]) if match[2] else np.arange(count)).reshape(list(sizes.values()))
    order = [i for i, name in enumerate(sizes) if name not in grouped]
    order += [list(sizes).index(name) for name in grouped]
    group_size = math.prod(sizes[name] for name in grouped)
    return tuple(map(tuple, ids.transpose(order).reshape(-1, group_size).tolist()))


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): 0, 1, 2, … in that shape, its axes then in that order; flat."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return (ids.transpose(_integers(order)) if order else ids).ravel()


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def element_types(result: str) -> list[tuple[str | None, tuple[int, ...]]]:
    """(dtype, shape) of every array in a type; the dtype is None where it is not known."""
    return [
        (_DTYPES.get(dtype), tuple(_integers(shape)))
        for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result)
    ]


def _instruction(match: re.Match[str]) -> Instruction:
    # Constants and parameters have a value in place of operands' names.
    operands = re.findall(r"%([\w.\-]+)", match["operands"]) or match["operands"].split()
    return Instruction(
        match["name"],
        match["result"],
        match["opcode"],
        tuple(operands),
        match["attributes"] or "",
        bool(match["root"]),
    )
