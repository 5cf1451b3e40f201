"""What holds for every test of the suite."""

from __future__ import annotations

import sys


def pytest_collection_finish() -> None:
    """Tests compute in one thread, as workers do: tiny operations on many threads spend their time waiting for each
    other, and bits may differ. Tests that never import torch do not pay for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
