"""How often a compiled loop runs: as XLA notes it, or from its counter's start, step and bound."""

import math
import re

from caat_jax.communication.hlo_module import Instruction, Module


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """The rounds of a `while` in a computation; None where they cannot be told."""
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
