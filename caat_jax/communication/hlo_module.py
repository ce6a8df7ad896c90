"""The text of a compiled program, XLA's scheduled HLO, as computations and instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

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


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`[ROOT] %name = result opcode(operands), attributes`."""

    name: str
    result: str  # its type, as written
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The value of `name=` at the top of the attributes, up to the comma that ends it."""
        match = re.search(rf"(?:^|, ){name}=", self.attributes)
        return _until_comma(self.attributes[match.end() :]) if match else None

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
        header = text.partition("\n")[0]
        # Replicas and partitions: without them, groups that are left empty have no members.
        counts = dict(re.findall(r"(num_partitions|replica_count)=(\d+)", header))
        self.devices = math.prod(int(count) for count in counts.values())
        current = None
        for line in _whole_lines(text.splitlines()[1:]):
            begin = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if begin and not line.startswith(" "):
                current = self.computations.setdefault(begin[2], {})
                if begin[1]:
                    self.entry = begin[2]
            elif line.startswith("}"):
                current = None
            elif current is not None and line.strip():
                instruction = _parse_instruction(line)
                if instruction is None:
                    self.unrecognised.append(line.strip()[:80])
                else:
                    current[instruction.name] = instruction

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


def _whole_lines(lines: list[str]) -> Iterator[str]:
    """Lines of instructions that break off inside of a bracket joined with those that follow."""
    begun, depth = "", 0
    for line in lines:
        unquoted = re.sub(r'"(?:\\.|[^"\\])*"', "", line)
        if begun or line.startswith(" "):
            depth += unquoted.count("{") - unquoted.count("}")
        if depth > 0:
            begun += line + " "
        else:
            yield begun + line
            begun, depth = "", 0


def _parse_instruction(line: str) -> Instruction | None:
    """`[ROOT] %name = type opcode(operands), attributes`."""
    match = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    rest = line[match.end() :]
    result = rest[: _closing(rest) + 1] if rest.startswith("(") else rest.partition(" ")[0]
    rest = rest[len(result) :].lstrip()
    opcode = re.match(r"([\w\-]+)\(", rest)
    if not opcode:
        return None
    rest = rest[opcode.end() - 1 :]
    end = _closing(rest)
    inner = re.sub(r"/\*.*?\*/", "", rest[1:end])
    # An operand may come with its type before its name.
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(inner) if part.strip())
    return Instruction(
        match[2], result, opcode[1], operands, rest[end + 1 :].removeprefix(", "), bool(match[1])
    )


def _until_comma(text: str) -> str:
    return next(_split(text), "").strip()


def _split(text: str) -> Iterator[str]:
    """The parts between commas that stand outside of brackets and quotes.

    `mesh[…], device_ids=(…) {…}` is one value that XLA writes with a comma in it.
    """
    begin = 0
    for i, depth in _depths(text):
        if depth == 0 and text[i] == "," and not text.startswith(", device_ids=", i):
            yield text[begin:i]
            begin = i + 1
    yield text[begin:]


def _closing(text: str) -> int:
    """Where the bracket that `text` begins with is closed."""
    return next(i for i, depth in _depths(text) if depth == 0 and text[i] in ")}]")


def _depths(text: str) -> Iterator[tuple[int, int]]:
    """Each place outside of quotes, and how many brackets are open after it."""
    depth, quoted, i = 0, False, 0
    while i < len(text):
        character = text[i]
        if quoted:
            if character == "\\":
                i += 1
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        else:
            depth += (character in "([{") - (character in ")]}")
            yield i, depth
        i += 1
