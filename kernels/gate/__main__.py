"""python -m counterweight.kernels.gate: compiles all cases with the triton that is installed; 1 when a limit is broken."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Both are read as triton is imported. Under the interpreter nothing is compiled; versions differ in whether they fuse.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton

from counterweight.kernels.gate import budget
from counterweight.kernels.gate.case import ARCHS, Case
from counterweight.kernels.gate.measurement import Measurement
from counterweight.kernels.gate.suite import all_cases, brief, measure_all

_BUDGETS = Path(__file__).with_name("budgets.toml")


def main(arguments: Sequence[str]) -> int:
    """Measures, then prints a table and either what is wrong or, with --update, what was written."""
    asked = _arguments(arguments)
    chosen = {
        (name, arch): case
        for name, case in all_cases().items()
        for arch in case.archs
        if asked.only in name and arch in asked.archs
    }
    if asked.brief:
        chosen = brief(chosen, asked.whole)
    if not chosen:
        print(f"no case whose name contains {asked.only!r} for {asked.archs}")
        return 1
    measured, failures = measure_all(chosen, asked.jobs)
    print(f"triton {triton.__version__}")
    print(f"{'case':60} {'arch':>6} {'registers':>9} {'shared':>8} {'ins/weight':>10}")
    for (name, arch), found in measured.items():
        rate = found.instructions_per_weight(chosen[name, arch])
        print(f"{name:60} {f'sm_{arch}':>6} {found.registers:9} {found.shared:8} {'' if rate is None else rate:>10}")
    if asked.update:
        _update(asked.budgets, chosen, measured)
    problems = failures + _problems(asked.budgets, chosen, measured)
    print("\n".join(problems) or f"{len(measured)} within their limits")
    return 1 if problems else 0


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m counterweight.kernels.gate", description=__doc__)
    parser.add_argument("--update", action="store_true", help="raise the limits to what is measured, drop old entries")
    parser.add_argument("--only", default="", metavar="PART", help="cases whose name contains this")
    parser.add_argument("--archs", type=_archs, default=ARCHS, help="such as 80,90; all of them by default")
    parser.add_argument("--brief", action="store_true", help="one case of each kernel on every arch")
    parser.add_argument("--whole", type=int, metavar="ARCH", help="with --brief: all cases on this one")
    parser.add_argument("--budgets", type=Path, default=_BUDGETS, help="the file of limits")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    return parser.parse_args(arguments)


def _archs(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _update(
    path: Path, chosen: Mapping[tuple[str, int], Case], measured: Mapping[tuple[str, int], Measurement]
) -> None:
    budgets = budget.read(path)
    for key in budget.without_case(budgets, all_cases().values()):
        del budgets[key]
    for key, found in measured.items():
        budgets[key] = budget.Budget.of(chosen[key], found).or_more(budgets.get(key))
    budget.write(path, budgets)


def _problems(
    path: Path, chosen: Mapping[tuple[str, int], Case], measured: Mapping[tuple[str, int], Measurement]
) -> list[str]:
    budgets = budget.read(path)
    found = [
        problem
        for (name, arch), measurement in measured.items()
        for problem in budget.violations(chosen[name, arch], arch, measurement, budgets.get((name, arch)))
    ]
    stale = budget.without_case(budgets, all_cases().values())
    return found + [f"{name} sm_{arch}: a budget without a case" for name, arch in stale]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
