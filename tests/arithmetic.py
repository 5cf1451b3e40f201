"""Runs the tests that compare numbers under the arithmetic of other processors: `python -m tests.arithmetic [--short]`.

Libraries choose their kernels by the processor, and sums in another order round differently. What a test states as a bound has
to hold for every order. The variables below make the libraries take the kernels of another processor, so far as this one can
run them: OpenBLAS (numpy, and so Triton's interpreter), ATen's own loops, oneDNN and MKL (torch).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "AVX2": {
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
    },
    "AVX512": {
        "OPENBLAS_CORETYPE": "SkylakeX",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
    "Zen": {"OPENBLAS_CORETYPE": "Zen"},
    "SSE": {
        "OPENBLAS_CORETYPE": "Nehalem",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
    },
    "2 threads": {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    "4 threads": {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"},
}
"""Name -> environment. tests/conftest.py gives torch as many threads as OMP_NUM_THREADS says."""

NEEDS_AVX512 = ("AVX512",)

SENSITIVE = ("tests/kernels", "tests/workers", "tests/stock", "tests/golden", "tests/pipeline", "tests/end_to_end")
EXACT = ("tests/kernels/gate", "tests/workers/storage", "tests/workers/checkpoint")
"""Folders below those of SENSITIVE that compute nothing in floating point."""

SHORT = ("AVX2", "SSE")
SHORT_TESTS = (
    "tests/kernels/gpu/test_weight_gemm.py",
    "tests/kernels/gpu/test_experts.py",
    "tests/kernels/gpu/test_activations.py",
    "tests/golden",
    "tests/workers/quantization",
    "tests/workers/compensation",
    "tests/workers/calibration",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.arithmetic", description=__doc__)
    parser.add_argument("--short", action="store_true", help="the most sensitive tests, two settings")
    parser.add_argument("--only", choices=SETTINGS, help="one setting")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(SHORT if asked.short else SETTINGS)
    results = {name: run(name, short=asked.short) for name in names}
    for name, result in results.items():
        print(f"{name:12} {result}")
    return 1 if any(result.startswith("failed") for result in results.values()) else 0


def run(name: str, *, short: bool) -> str:
    """Runs the tests under one setting; returns what became of it, which begins with `failed` where a test failed."""
    if name in NEEDS_AVX512 and "avx512f" not in Path("/proc/cpuinfo").read_text():
        return "left out: this processor has no AVX512"
    tests = SHORT_TESTS if short else [*SENSITIVE, *(f"--ignore={folder}" for folder in EXACT)]
    present = [test for test in tests if test.startswith("--") or (ROOT / test).exists()]
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses=4", "--dist=worksteal", *present]
    print(f"== {name}: {' '.join(f'{key}={value}' for key, value in SETTINGS[name].items())}", flush=True)
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **SETTINGS[name]}, check=False)
    return f"{'failed' if done.returncode else 'passed'} in {time.monotonic() - begun:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
