"""FLOPs of the matrix products and attention kernels of a compiled program.

A multiplication and an addition are two.  Loops between an operation's start and its end are left
out; so far none has stood there.
"""

import itertools
import math
import re

from caat_jax.communication.hlo_module import CALLS, Instruction, Module, element_types

_Shape = tuple[int, ...]


def flops(module: Module, computation: str, instruction: Instruction) -> float:
    """FLOPs of one execution, those of a fusion's or a call's computation included.

    Args:
      module: the program.
      computation: the name of the one that the instruction is in.
      instruction: any.
    """
    operands = [
        shape
        for name in instruction.operands
        if name in module.computations[computation]
        for _, shape in element_types(module.computations[computation][name].result)
    ]
    match instruction.opcode:
        case "dot":
            contracted = instruction.integers("lhs_contracting_dims")
            return _product(instruction, operands[0], contracted)
        case "convolution":
            return _convolution(instruction, *operands[:2])
        case "custom-call":
            return _kernel(instruction, operands)
        case "fusion" | "call":
            return sum(
                flops(module, name, inner)
                for name in instruction.called(*CALLS)
                for inner in module.computations[name].values()
            )
    return 0.0


def _product(instruction: Instruction, left: _Shape, contracted: list[int]) -> float:
    (_, result), *_ = element_types(instruction.result)
    return 2.0 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _convolution(instruction: Instruction, left: _Shape, right: _Shape) -> float:
    """TPUs' way to write a product, batched or not, as "0bf_0io->0bf" with a window over axis 0.

    Counted are the places of the window that meet an element of `left`.
    """
    labels = re.split("_|->", instruction.attribute("dim_labels") or "")
    (_, result), *_ = element_types(instruction.result)
    sizes = [
        dict(zip(part, shape, strict=True))
        for part, shape in zip(labels, (left, right, result), strict=True)
    ]
    total = 2.0 * sizes[1]["i"] * sizes[2]["b"] * sizes[2]["f"]
    window = instruction.attribute("window") or ""
    for axis in sorted(label for label in labels[0] if label.isdigit()):
        total *= _window_places(window, int(axis), *(size[axis] for size in sizes))
    return total


def _window_places(window: str, axis: int, left: int, width: int, result: int) -> int:
    """How many pairs of an output and a place of its window have an input, along one axis."""

    def option(name: str, default: str) -> str:
        match = re.search(rf"\b{name}=([\dx_\-]+)", window)
        return match[1].split("x")[axis] if match else default

    stride, spread = int(option("stride", "1")), int(option("lhs_dilate", "1"))
    step, before = int(option("rhs_dilate", "1")), int(option("pad", "0_0").split("_")[0])
    places = (
        at * stride + tap * step - before
        for at, tap in itertools.product(range(result), range(width))
    )
    return sum(place % spread == 0 and 0 <= place // spread < left for place in places)


def _kernel(instruction: Instruction, operands: list[_Shape]) -> float:
    """Attention by cuDNN or by the TPU's kernel, products by cuBLAS; 0 for any other kernel."""
    target = (instruction.attribute("custom_call_target") or "").strip('"')
    if target.startswith("__cublas$"):
        axes = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', instruction.attributes)
        return _product(instruction, operands[0], [int(n) for n in re.findall(r"\d+", axes[1])])
    # [batch, sequence, heads, width] in cuDNN, [batch, heads, sequence, width] on TPUs.
    if target.startswith("__cudnn$fmha"):
        sequence, backward = 1, "Backward" in target
    elif target == "tpu_custom_call" and "splash_mha" in instruction.name:
        sequence, backward = 2, "_d" in instruction.name.removeprefix("splash_mha")
    else:
        return 0.0
    query, key, *_ = (shape for shape in operands if len(shape) == 4)
    # Two products forward; backward four, and the scores again.  Half of each is masked.
    return (5 if backward else 2) * math.prod(query) * key[sequence]
