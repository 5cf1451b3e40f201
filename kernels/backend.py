"""Which kernels a layer runs on: one switch for the whole package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from counterweight.kernels.linear import CompensatedLinear

if TYPE_CHECKING:
    from counterweight.kernels.gpu.host_memory import HostArena

Kernels = Literal["auto", "torch", "triton"]
"""torch: plain torch, anywhere. triton: Triton kernels, or an error where they cannot run. auto: Triton on a GPU for every
layer that it has kernels for, torch otherwise; a layer's representation says which it is."""


def experts_on_kernels(
    experts: Sequence[Mapping[str, CompensatedLinear]],
    product: Callable[[Tensor, Tensor], Tensor],
    kernels: Kernels = "auto",
) -> nn.Module | None:
    """A module that runs all these experts (gate_proj, up_proj, down_proj of each) in one launch a projection; None where that
    is not possible or not asked for, so that each of their layers runs by itself. product: (gate, up) -> the input of
    down_proj."""
    device = experts[0]["gate_proj"].device
    if not _wanted(kernels, device):
        return None
    from counterweight.kernels.gpu.launch import runs_on
    from counterweight.kernels.gpu.mixture import KernelExperts, unsupported

    if not runs_on(device) or unsupported(experts) is not None:
        return None
    return KernelExperts(experts, product)


def on_kernels(linear: CompensatedLinear, kernels: Kernels = "auto", arena: HostArena | None = None) -> nn.Module:
    """`linear`, or the layer that takes its place on the device where its weight lies.

    arena: where residual rows are kept, for a GPU to read them from host memory; None: on the device. Raises ValueError for
    `triton` where a kernel cannot run, with the reason.
    """
    if not _wanted(kernels, linear.device):
        return linear
    from counterweight.kernels.gpu.launch import runs_on
    from counterweight.kernels.gpu.linear import KernelLinear, unsupported

    reason = unsupported(linear)
    if not runs_on(linear.device):
        reason = f"weight on {linear.device}: expected a GPU, or TRITON_INTERPRET=1 for Triton's interpreter"
    if reason is None:
        return KernelLinear(linear, arena)
    if kernels == "auto":
        return linear
    raise ValueError(f"kernels: triton: {reason}")


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels are what computes on this device unless somebody asks for another."""
    return _wanted("auto", device)


def _wanted(kernels: Kernels, device: torch.device) -> bool:
    """Whether Triton is asked for, and there; ValueError when it is asked for by name and is not."""
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return False
    installed = find_spec("triton") is not None
    if kernels == "triton" and not installed:
        raise ValueError("kernels: triton: expected triton to be installed")
    return installed
