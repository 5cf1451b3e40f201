"""What holds for every test of the suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Triton settles how it runs kernels when it is first imported, which transformers does too: so before any test module.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Servers of tests are away for good; those tests that wait for one say so.
os.environ.setdefault("COUNTERWEIGHT_OUTAGE_SECONDS", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Examples of Hypothesis are the same in every run and may take any time; other ones are looked for by `make fuzz`, or with
    --hypothesis-profile=default."""
    if config.pluginmanager.hasplugin("hypothesispytest") and not config.getoption("--hypothesis-profile"):
        from hypothesis import settings

        settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """No test draws other numbers because of those that ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_finish() -> None:
    """Tests compute in one thread, as workers do, unless OMP_NUM_THREADS asks for more: tiny operations on many threads spend
    their time waiting for each other. Tests that never import torch do not pay for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
