"""What the text of `cuobjdump -res-usage -sass` says about a kernel: resources, operations, hot loop. Pure text, no tools."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SPIN = 16
"""Innermost loops shorter than this wait for a barrier; they are part of the loop around them."""

_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
_ADDRESS = re.compile(r"^(?:(.*),\s*)?0x([0-9a-f]+)$")
_REGISTER = re.compile(r"R(\d+)\b")
_LEFT = re.compile(r"R\d+, R(\d+),")
_JUMPS = frozenset({"BRA", "CALL"})
_ENDS = frozenset({"EXIT", "RET"})


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS. opcode: with its modifiers, such as LDG.E.128. operands: as they stand there. target: where it may
    jump; always: it has no condition, the next line does not follow."""

    address: int
    opcode: str
    operands: str
    target: int | None
    always: bool

    @property
    def operation(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def written(self) -> range:
        """Registers that it writes, as far as its first operand and the width in its name say; none for a product of a
        warpgroup, which is waited for."""
        register = _REGISTER.match(self.operands)
        if register is None or self.operation == "HGMMA":
            return range(0)
        modifiers = self.opcode.split(".")[1:]
        width = 4 if "128" in modifiers else 2 if {"64", "WIDE"} & set(modifiers) else 1
        return range(int(register[1]), int(register[1]) + width)


@dataclass(frozen=True, slots=True)
class Disassembly:
    """registers: per thread; stack: bytes per thread, of spills and of arrays that registers cannot hold."""

    registers: int
    stack: int
    instructions: tuple[Instruction, ...]

    @property
    def spills(self) -> int:
        """Instructions that load from or store to a thread's stack."""
        return sum(instruction.operation in ("LDL", "STL") for instruction in self.instructions)

    @property
    def opcodes(self) -> frozenset[str]:
        return frozenset(instruction.opcode for instruction in self.instructions)

    @property
    def hazards(self) -> int:
        """Instructions of innermost loops that write a register out of which an asynchronous product may still be reading."""
        return sum(map(_hazards, innermost_loops(self.instructions)))

    @property
    def hot_loop(self) -> int:
        """Instructions in one turn of the longest innermost loop; 0 without a loop."""
        return max(map(len, innermost_loops(self.instructions)), default=0)


def parse(text: str) -> Disassembly:
    """Reads one function; ValueError when the text holds none or several."""
    resources = _RESOURCES.findall(text)
    if len(resources) != 1:
        raise ValueError(f"text: {len(resources)} functions: expected the resources and instructions of one")
    registers, stack = map(int, resources[0])
    return Disassembly(registers, stack, tuple(_instructions(text)))


def _instructions(text: str) -> Iterable[Instruction]:
    for address, guard, opcode, operands in _INSTRUCTION.findall(text):
        operation = opcode.partition(".")[0]
        jump = _ADDRESS.match(operands) if operation in _JUMPS else None
        # BRA.U UP0, 0x40 and BRA.DIV UR4, 0x40 have their condition among the operands.
        always = not guard and (operation in _ENDS or (operation == "BRA" and jump is not None and not jump[1]))
        yield Instruction(int(address, 16), opcode, operands, int(jump[2], 16) if jump else None, always)


def _hazards(loop: Sequence[Instruction]) -> int:
    """Of one loop, whose products (HGMMA, 4 registers of the left operand) stay under way until WARPGROUP.DEPBAR leaves fewer
    of them. Looked at in the second turn, when those of the first may be under way too."""
    running: list[range] = []
    found: set[int] = set()
    for instruction in [*loop, *loop]:
        if instruction.operation == "HGMMA":
            left = _LEFT.match(instruction.operands)
            first = int(left[1]) if left else 0
            running.append(range(first, first + 4) if left else range(0))
        elif instruction.opcode == "WARPGROUP.DEPBAR.LE":
            allowed = int(instruction.operands.rpartition(",")[2], 16)
            running = running[-allowed:] if allowed else []
        elif any(register in read for register in instruction.written for read in running):
            found.add(instruction.address)
    return len(found)


def matches(opcode: str, wanted: str) -> bool:
    """Whether an opcode is `wanted`, which names the operation and any of its modifiers: LDG.128 matches LDG.E.EF.128."""
    operation, *modifiers = opcode.split(".")
    wanted_operation, *wanted_modifiers = wanted.split(".")
    return operation == wanted_operation and set(wanted_modifiers) <= set(modifiers)


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The natural loops that hold no other, each in order of address.

    Backward jumps alone do not tell: code that waits for a barrier stands behind the function's end and jumps back into
    the middle of the loop it belongs to.
    """
    place = {instruction.address: index for index, instruction in enumerate(instructions)}
    before: list[list[int]] = [[] for _ in instructions]
    for index, instruction in enumerate(instructions):
        after = [] if instruction.always or index + 1 == len(instructions) else [index + 1]
        if instruction.target in place:
            after.append(place[instruction.target])
        for successor in after:
            before[successor].append(index)
    bodies: dict[int, set[int]] = {}
    for head, predecessors in enumerate(before):
        for tail in predecessors:
            if tail >= head and (body := _body(head, tail, before)) is not None:
                bodies[head] = bodies.get(head, set()) | body
    loops = {head: body for head, body in bodies.items() if len(body) >= SPIN}
    return [
        [instructions[index] for index in sorted(body)]
        for head, body in loops.items()
        if not any(other in body for other in loops if other != head)
    ]


def _body(head: int, tail: int, before: Sequence[Sequence[int]]) -> set[int] | None:
    """What reaches `tail` without passing `head`, both included; None when the entry does, for then it is no loop."""
    body, waiting = {head, tail}, [tail] if tail != head else []
    while waiting:
        for index in before[waiting.pop()]:
            if index not in body:
                body.add(index)
                waiting.append(index)
    return None if 0 in body and head != 0 else body
