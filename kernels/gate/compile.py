"""Compiles a case ahead of time and measures what came out. Needs no GPU: triton carries ptxas and cuobjdump with it."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from counterweight.kernels.gate import disassembly
from counterweight.kernels.gate.case import Case
from counterweight.kernels.gate.measurement import Measurement
from counterweight.kernels.gpu import launch

_CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


class CompilationFailed(Exception):
    """Triton or ptxas does not compile a case; the text names it."""


def measure(case: Case, arch: int) -> Measurement:
    """Compiles `case` for sm_`arch`. CompilationFailed when triton refuses; ValueError for a case with wrong arguments."""
    names = case.kernel.arg_names
    constants = {**case.constants, **({"WAIT": launch.waits(arch // 10)} if "WAIT" in names else {})}
    if missing := [name for name in names if name not in case.types and name not in constants]:
        raise ValueError(f"{case.name}: {', '.join(missing)}: neither in types nor in constants")
    if unknown := [name for name in (*case.types, *case.constants, *case.aligned) if name not in names]:
        raise ValueError(f"{case.name}: {', '.join(unknown)}: no arguments of the kernel")
    signature = {name: "constexpr" if name in constants else case.types[name] for name in names}
    divisible = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=divisible)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    except (TritonError, RuntimeError) as error:
        raise CompilationFailed(f"{case.name} sm_{arch}: does not compile: {error}") from error
    parsed = disassembly.parse(_disassemble(compiled.asm["cubin"]))
    return Measurement(
        registers=parsed.registers,
        stack=parsed.stack,
        spills=parsed.spills,
        shared=int(compiled.metadata.shared),
        hazards=parsed.hazards,
        hot_loop=parsed.hot_loop,
        opcodes=tuple(sorted(parsed.opcodes)),
    )


def fingerprint(case: Case, arch: int) -> str:
    """What a measurement depends on: the kernel with all it calls, the case, triton, and how we read the disassembly."""
    reader = Path(disassembly.__file__).read_text()
    choices = (case.types, case.constants, case.aligned, case.options)
    parts = (
        triton.__version__,
        str(launch.waits(arch // 10)),
        case.kernel.cache_key,
        *map(str, choices),
        str(arch),
        reader,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
