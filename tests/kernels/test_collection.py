"""The kernels' tests themselves: they start on a machine of inference, and in the mode that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
COLLECT = """
import sys
import pytest
for name in ("pydantic", "boto3", "ray", "datasets"):
    sys.modules[name] = None  # an import of it fails
sys.exit(pytest.main(["--collect-only", "-q", "tests/kernels/gpu"]))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_only_whole_artifacts_need_what_the_pipeline_needs() -> None:
    done = python(COLLECT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_weight_gemm.py" in done.stdout
    assert "test_serving.py" not in done.stdout


@pytest.mark.parametrize("mode", ["0", "1"])
def test_a_mode_that_was_asked_for_is_kept(mode: str) -> None:
    done = python("import os, tests.conftest; print(os.environ['TRITON_INTERPRET'])", TRITON_INTERPRET=mode)
    assert done.stdout.strip() == mode, done.stderr
