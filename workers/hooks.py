"""Looking at what enters the linears of a block while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.experts import SeparateExperts
from counterweight.workers.models.family import SharedInputGroup

Take = Callable[[SharedInputGroup, Tensor], None]
"""Called with a group of linears and the input [..., in] that they share."""

Look = Callable[[SeparateExperts, Tensor], None]
"""Called with a sparse MLP's experts and the tokens [tokens, hidden] that they are about to see."""


@contextmanager
def input_hooks(block: Block, groups: Iterable[SharedInputGroup], take: Take) -> Iterator[None]:
    """Calls `take` whenever something enters the first linear of one of `groups`, while the context is open."""
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for group in groups:

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], group: SharedInputGroup = group) -> None:
                take(group, arguments[0])

            handles.append(block.linear(group[0]).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def expert_hook(block: Block, look: Look) -> Iterator[None]:
    """Calls `look` before the experts of a sparse block run, while the context is open."""
    found = block.separate_experts()
    if found is None:
        yield
        return
    handle = found[1].register_forward_pre_hook(lambda experts, given: look(experts, experts.tokens(*given)))
    try:
        yield
    finally:
        handle.remove()
