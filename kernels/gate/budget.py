"""Limits of each case on each architecture, kept in budgets.toml, and what breaks them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from counterweight.kernels.gate.case import Case
from counterweight.kernels.gate.disassembly import matches
from counterweight.kernels.gate.measurement import Measurement

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program can have."""

_PREFIX = "sm_"
_HEADER = (
    "# What each kernel may use on each architecture, the larger of triton 3.6 and 3.9: registers per thread, bytes of\n"
    "# shared memory, thread instructions per weight in the hot loop. Written by\n"
    "# `python -m counterweight.kernels.gate --update`, which only raises a limit: after an improvement, delete its entries\n"
    "# and update under both versions.\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a kernel may use; instructions_per_weight: None when it is not held to it."""

    registers: int
    shared: int
    instructions_per_weight: float | None = None

    @classmethod
    def of(cls, case: Case, measured: Measurement) -> Budget:
        """What it uses now."""
        return cls(
            registers=measured.registers,
            shared=measured.shared,
            instructions_per_weight=measured.instructions_per_weight(case),
        )

    def or_more(self, other: Budget | None) -> Budget:
        """The larger of each limit; of instructions per weight, while `self` is held to it."""
        if other is None:
            return self
        mine, others = self.instructions_per_weight, other.instructions_per_weight
        return Budget(
            registers=max(self.registers, other.registers),
            shared=max(self.shared, other.shared),
            instructions_per_weight=mine if mine is None or others is None else max(mine, others),
        )


Budgets = Mapping[tuple[str, int], Budget]
"""By name of the case and architecture."""


def read(path: Path) -> dict[tuple[str, int], Budget]:
    """The budgets of a file; none where there is no file."""
    if not path.exists():
        return {}
    table = tomllib.loads(path.read_text())
    return {
        (name, int(arch.removeprefix(_PREFIX))): Budget(**limits)
        for name, by_arch in table.items()
        for arch, limits in by_arch.items()
    }


def write(path: Path, budgets: Budgets) -> None:
    """One table a case, one line an architecture, sorted."""
    lines, last = [_HEADER], None
    for (name, arch), budget in sorted(budgets.items()):
        if name != last:
            lines.append(f"\n[{json.dumps(name)}]\n")
            last = name
        limits = f"registers = {budget.registers}, shared = {budget.shared}"
        if budget.instructions_per_weight is not None:
            limits += f", instructions_per_weight = {budget.instructions_per_weight}"
        lines.append(f"{_PREFIX}{arch} = {{ {limits} }}\n")
    path.write_text("".join(lines))


def violations(case: Case, arch: int, measured: Measurement, budget: Budget | None) -> list[str]:
    """What is wrong with a kernel as it was measured, one line each: empty when all is well."""
    found = [
        f"{name} {value}, limit 0" for name in ("spills", "stack", "hazards") if (value := getattr(measured, name))
    ]
    if measured.shared > SHARED_LIMIT[arch]:
        found.append(f"shared {measured.shared}, limit of the architecture {SHARED_LIMIT[arch]}")
    for wanted in case.required.get(arch, ()):
        if not any(matches(opcode, wanted) for opcode in measured.opcodes):
            found.append(f"no {wanted} among its instructions")
    if budget is None:
        found.append("no budget: run `python -m counterweight.kernels.gate --update` under each version of triton")
    else:
        used = Budget.of(case, measured)
        for name in ("registers", "shared", "instructions_per_weight"):
            value, limit = getattr(used, name), getattr(budget, name)
            if (value is None) != (limit is None):
                found.append(f"{name} {value}, limit {limit}: one is missing")
            elif value is not None and value > limit:
                found.append(f"{name} {value}, limit {limit}")
    return [f"{case.name} {_PREFIX}{arch}: {problem}" for problem in found]


def without_case(budgets: Budgets, cases: Iterable[Case]) -> list[tuple[str, int]]:
    """The budgets of which there is no case any more."""
    known = {(case.name, arch) for case in cases for arch in case.archs}
    return sorted(set(budgets) - known)
