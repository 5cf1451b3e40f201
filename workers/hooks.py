"""Looking at what enters the linears of a block while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from counterweight.workers.architecture import Siblings
from counterweight.workers.skeleton import Block

Take = Callable[[Siblings, Tensor], None]
"""Called with a group of siblings and the input [..., in] that they share."""


@contextmanager
def input_hooks(block: Block, groups: Iterable[Siblings], take: Take) -> Iterator[None]:
    """Calls `take` whenever something enters the first linear of one of `groups`, while the context is open."""
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for group in groups:

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], group: Siblings = group) -> None:
                take(group, arguments[0])

            handles.append(block.linear(group[0]).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
