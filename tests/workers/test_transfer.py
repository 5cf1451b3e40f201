"""Hidden states on their way between the workspace and a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counterweight.workers.context import TaskContext
from counterweight.workers.passing import pass_on, receive
from counterweight.workers.storage import open_store
from counterweight.workers.transfer import to_device, to_host
from counterweight.workers.workspace import Workspace

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    context, workspace = TaskContext(CPU, 1), Workspace(open_store(tmp_path.as_uri()))
    hidden = torch.randn(2, 8, 16).to(dtype)
    found = receive(context, workspace, pass_on(context, workspace, hidden, room=0, lasting=True))
    context.close()
    assert found.dtype is dtype
    assert torch.equal(found, hidden)


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.randn(4)
    assert to_host(tensor) is tensor
    assert to_device(tensor, CPU) is tensor


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_through_pinned_memory() -> None:
    tensor = torch.randn(64, 3).T
    there = to_device(tensor, torch.device("cuda"))
    assert there.is_cuda
    back = to_host(there)
    assert back.is_pinned()
    assert torch.equal(back, tensor)
