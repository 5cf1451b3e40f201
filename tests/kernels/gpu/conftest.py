"""Kernels run compiled where there is a GPU, and under Triton's interpreter elsewhere: the same tests for both."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
