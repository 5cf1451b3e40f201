"""The readers on small texts; the gate itself as a process, for tests may run under the interpreter, which compiles nothing.

Triton must not be imported while tests are collected: the mode is not settled yet (tests/kernels/gpu/conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from counterweight.kernels.gate import budget
from counterweight.kernels.gate.budget import Budget
from counterweight.kernels.gate.case import Case
from counterweight.kernels.gate.disassembly import innermost_loops, matches, parse
from counterweight.kernels.gate.measurement import Measurement
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]
BUDGETS = ROOT / "kernels" / "gate" / "budgets.toml"
OTHER_TRITON = "COUNTERWEIGHT_TRITON_36"

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:147 STACK:{stack} SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
"""


def sass(*lines: str, stack: int = 0) -> str:
    """As cuobjdump prints it: an address before each instruction, its encoding behind and in the line below."""
    body = "".join(
        f"        /*{16 * index:04x}*/                   {line} ;   /* 0x00000a00ff017b82 */\n"
        f"{' ' * 80}/* 0x000fe20000000800 */\n"
        for index, line in enumerate(lines)
    )
    return RESOURCES.format(stack=stack) + body


def test_reads_resources_and_opcodes() -> None:
    parsed = parse(
        sass("LDC R1, c[0x0][0x28]", "@!P0 LDG.E.EF.128 R4, desc[UR4][R2.64]", "STL [R1], R4", "LDL R4, [R1]", stack=8)
    )
    assert (parsed.registers, parsed.stack, parsed.spills) == (147, 8, 2)
    assert parsed.opcodes == {"LDC", "LDG.E.EF.128", "STL", "LDL"}
    assert parsed.hot_loop == 0
    with pytest.raises(ValueError, match="0 functions"):
        parse("nothing")


def test_an_operation_is_found_whatever_else_modifies_it() -> None:
    assert matches("LDG.E.EF.128", "LDG.128")
    assert matches("HGMMA.64x16x16.F32.BF16", "HGMMA")
    assert not matches("LDG.E.64", "LDG.128")
    assert not matches("LDGSTS.E.BYPASS.128", "LDG.128")


WORK = ["IADD3 R0, R0, 0x1, RZ"] * 20


def test_counts_a_loop_from_its_head_to_its_jump() -> None:
    parsed = parse(sass("S2R R0, SR_TID.X", *WORK, "@!P1 BRA 0x10", "EXIT", "BRA 0x170"))
    assert parsed.hot_loop == 21


def test_counts_the_innermost_of_nested_loops_and_the_longest_of_several() -> None:
    nested = [*WORK, *WORK, "@P0 BRA 0x140", *WORK, "BRA.U UP0, 0x0", "EXIT"]
    assert parse(sass(*nested)).hot_loop == 21
    assert parse(sass(*WORK, "@P0 BRA 0x0", *WORK, *WORK, "@P0 BRA 0x150", "EXIT")).hot_loop == 41


def test_a_wait_behind_the_end_belongs_to_the_loop_that_jumps_there() -> None:
    """As compiled for sm_100: a backward jump into the middle of a loop is not a loop of its own."""
    lines = [
        "NOP",
        *WORK,
        "@!P3 BRA 0x2d0",  # 0x150: not there yet
        *WORK,
        "@!P0 BRA 0x10",  # 0x2a0
        "NOP",
        "EXIT",  # 0x2c0
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR23+0x9000], RZ",
        "@!P3 BRA 0x2d0",
        "BRA 0x160",
    ]
    loops = innermost_loops(parse(sass(*lines)).instructions)
    assert [len(loop) for loop in loops] == [20 + 1 + 20 + 1 + 3]
    assert loops[0][0].address == 0x10


def test_a_loop_may_be_left_by_a_call_and_closed_without_condition() -> None:
    """As triton 3.6 does for sm_80."""
    lines = ["NOP", *WORK, "@P3 CALL.REL.NOINC 0x170", "BRA 0x10", "EXIT"]
    assert parse(sass(*lines)).hot_loop == 22


def turns(*lines: str, allowed: int) -> list[str]:
    """A loop whose second turn begins while the products of the first may be under way, but for those that were waited for."""
    return [
        *lines,
        "HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR8], R24, gsb0",
        f"WARPGROUP.DEPBAR.LE gsb0, 0x{allowed:x}",
        "HGMMA.64x256x16.F32.BF16 R24, R156, gdesc[UR8], R24, gsb0",
        f"WARPGROUP.DEPBAR.LE gsb0, 0x{allowed:x}",
        *WORK,
        "@P0 BRA 0x0",
        "EXIT",
    ]


WRITES = ["HMUL2.BF16_V2 R155, R4, R5", "LDS.64 R156, [R2]", "LDS.128 R160, [R2]", "STS [R2], R152"]


def test_registers_that_a_product_reads_are_not_written_before_it_is_waited_for() -> None:
    assert parse(sass(*turns(*WRITES, allowed=0))).hazards == 0
    assert parse(sass(*turns(*WRITES, allowed=1))).hazards == 1  # the second product is left under way
    assert parse(sass(*turns(*WRITES, allowed=3))).hazards == 2
    assert parse(sass(*turns("WARPGROUP.DEPBAR.LE gsb0, 0x0", *WRITES, allowed=3))).hazards == 0


CASE = Case(
    name="some/kernel",
    kernel=None,
    types={},
    constants={},
    options={"num_warps": 8},
    weights_per_iteration=8192,
    required={90: ("HGMMA",)},
)
MEASURED = Measurement(
    registers=100, stack=0, spills=0, hazards=0, shared=4096, hot_loop=80, opcodes=("HGMMA.64x16x16.F32", "EXIT")
)
ALLOWED = Budget(registers=100, shared=4096, instructions_per_weight=2.5)


def problems(arch: int = 90, allowed: Budget | None = ALLOWED, **changes: object) -> list[str]:
    return budget.violations(CASE, arch, replace(MEASURED, **changes), allowed)  # type: ignore[arg-type]


def test_what_is_within_its_budget_passes() -> None:
    assert MEASURED.instructions_per_weight(CASE) == 32 * 8 * 80 / 8192
    assert problems() == []
    assert problems(arch=80, opcodes=()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"registers": 101}, "some/kernel sm_90: registers 101, limit 100"),
        ({"shared": 4097}, "some/kernel sm_90: shared 4097, limit 4096"),
        ({"hot_loop": 81}, "some/kernel sm_90: instructions_per_weight 2.53, limit 2.5"),
        ({"spills": 1}, "some/kernel sm_90: spills 1, limit 0"),
        ({"stack": 8}, "some/kernel sm_90: stack 8, limit 0"),
        ({"opcodes": ("HMMA.16816",)}, "some/kernel sm_90: no HGMMA among its instructions"),
        (
            {"allowed": replace(ALLOWED, instructions_per_weight=None)},
            "some/kernel sm_90: instructions_per_weight 2.5, ",
        ),
        ({"allowed": None}, "some/kernel sm_90: no budget"),
    ],
)
def test_each_limit_holds(changes: dict[str, object], problem: str) -> None:
    (found,) = problems(**changes)
    assert found.startswith(problem)


def test_no_budget_goes_beyond_the_architecture() -> None:
    (found,) = problems(arch=89, shared=101377, allowed=replace(ALLOWED, shared=10**6))
    assert found == "some/kernel sm_89: shared 101377, limit of the architecture 101376"


def test_budgets_are_raised_never_lowered() -> None:
    lower = Budget(registers=90, shared=8192, instructions_per_weight=2.4)
    assert ALLOWED.or_more(lower) == Budget(registers=100, shared=8192, instructions_per_weight=2.5)
    assert ALLOWED.or_more(None) == ALLOWED
    # A case that is newly held to a rate, or no longer.
    assert ALLOWED.or_more(replace(lower, instructions_per_weight=None)).instructions_per_weight == 2.5
    assert replace(ALLOWED, instructions_per_weight=None).or_more(lower).instructions_per_weight is None


def test_budgets_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    assert budget.read(path) == {}
    budgets = {("b/x y", 100): ALLOWED, ("b/x y", 90): ALLOWED, ("a/z", 80): Budget(registers=1, shared=0)}
    budget.write(path, budgets)
    assert budget.read(path) == budgets
    assert budget.without_case(budgets, [replace(CASE, name="b/x y", archs=(90,))]) == [("a/z", 80), ("b/x y", 100)]


def gate(*arguments: str, triton: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = triton
    command = [sys.executable, "-m", "counterweight.kernels.gate", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE)


@pytest.mark.timeout(2 * PATIENCE)
def test_every_kernel_is_within_its_budget() -> None:
    """With the triton that is installed here, which no GPU of ours has: each kernel once on each."""
    done = gate("--brief")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.skipif(OTHER_TRITON not in os.environ, reason=f"{OTHER_TRITON}: not set to a directory with triton 3.6")
def test_every_kernel_is_within_its_budget_with_the_older_triton() -> None:
    done = gate("--brief", "--whole", "90", triton=os.environ[OTHER_TRITON])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("triton 3.6")


NAME = "gram/fp32"


def measured_budgets(path: Path) -> dict[tuple[str, int], Budget]:
    """What one case uses with the triton that is installed, in a file of its own."""
    gate("--update", "--only", NAME, "--archs", "90", "--budgets", str(path))
    return budget.read(path)


def test_one_register_too_many_fails(tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    ((key, used),) = measured_budgets(path).items()
    assert key == (NAME, 90)
    arguments = ("--only", NAME, "--archs", "90", "--budgets", str(path))
    assert gate(*arguments).returncode == 0
    budget.write(path, {key: replace(used, registers=used.registers - 1)})
    done = gate(*arguments)
    assert done.returncode == 1
    assert f"{NAME} sm_90: registers {used.registers}, limit {used.registers - 1}" in done.stdout.splitlines()


def test_a_budget_without_a_case_fails_until_it_is_updated(tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    budgets = measured_budgets(path)
    budget.write(path, {**budgets, ("gone", 90): ALLOWED})
    done = gate("--only", NAME, "--archs", "90", "--budgets", str(path))
    assert done.returncode == 1
    assert "gone sm_90: a budget without a case" in done.stdout.splitlines()
    assert measured_budgets(path) == budgets


def test_a_case_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from counterweight.kernels.gate import compile as compiler

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(compiler, "ASTSource", lambda **_: None)
    monkeypatch.setattr(compiler.triton, "compile", refuse)
    case = replace(CASE, kernel=SimpleNamespace(arg_names=[]))
    with pytest.raises(
        compiler.CompilationFailed, match="some/kernel sm_90: does not compile: PassManager::run failed"
    ):
        compiler.measure(case, 90)


def test_a_case_gives_every_argument_and_no_other() -> None:
    from counterweight.kernels.gate.compile import measure

    case = replace(CASE, kernel=SimpleNamespace(arg_names=["x", "BLOCK"]), types={"x": "*bf16"})
    with pytest.raises(ValueError, match="some/kernel: BLOCK: neither"):
        measure(case, 90)
    with pytest.raises(ValueError, match="some/kernel: y: no arguments"):
        measure(replace(case, constants={"BLOCK": 1}, aligned=("x", "y")), 90)


def test_nothing_to_measure_is_an_error() -> None:
    done = gate("--only", "no such kernel")
    assert done.returncode == 1
    assert "no such kernel" in done.stdout


def test_the_brief_choice_leaves_no_kernel_out() -> None:
    from counterweight.kernels.gate.suite import brief

    kernels = [SimpleNamespace(__name__=name) for name in ("one", "two")]
    cases = [
        replace(CASE, name="a", kernel=kernels[0], archs=(80, 90, 100)),
        replace(CASE, name="b", kernel=kernels[0], archs=(80, 90)),
        replace(CASE, name="c", kernel=kernels[1], archs=(90, 100)),
        replace(CASE, name="d", kernel=kernels[1], archs=(80, 100)),
    ]
    chosen = {(case.name, arch): case for case in cases for arch in case.archs}
    every = [("a", 80), ("a", 90), ("a", 100), ("c", 90), ("c", 100), ("d", 80)]
    assert list(brief(chosen, None)) == every
    assert list(brief(chosen, 90)) == [*every[:3], ("b", 90), *every[3:]]
