from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

from counterweight.kernels.decoding import is_decoding, tell_length


class Inner(nn.Module):
    """Says whether it thinks that tokens come one at a time, about a list of tokens without sequences."""

    def __init__(self, meet: Barrier | None = None) -> None:
        super().__init__()
        self.meet = meet

    def forward(self, x: Tensor) -> bool:
        if self.meet is not None:
            self.meet.wait(10)
        return is_decoding(x.flatten(0, -2))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> bool:
        found: bool = self.inner(hidden)
        return found


def told(inner: nn.Module) -> Outer:
    outer = Outer(inner)
    tell_length(outer)
    return outer


def test_alone_an_input_says_it_itself() -> None:
    assert is_decoding(torch.zeros(3, 1, 8))
    assert not is_decoding(torch.zeros(3, 2, 8))


@pytest.mark.parametrize("copied", [False, True])
def test_inside_a_layer_its_length_counts_and_not_how_many_tokens_a_list_has(copied: bool) -> None:
    layer = copy.deepcopy(told(Inner())) if copied else told(Inner())
    assert layer(torch.zeros(3, 1, 8), mask=None)
    assert not layer(torch.zeros(3, 2, 8), mask=None)
    assert is_decoding(torch.zeros(3, 1, 8)), "the layer is left"


def test_a_layer_that_fails_is_left_too() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        told(Fails())(torch.zeros(3, 2, 8))
    assert is_decoding(torch.zeros(1, 8))


def test_threads_do_not_tell_each_other() -> None:
    """Both are inside the layer at the same time."""
    layer = told(Inner(Barrier(2)))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(layer, (torch.zeros(2, 1, 8), torch.zeros(2, 5, 8)))) == [True, False]
