"""Results that a kernel has yet to write, full of poison and between bands of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from tests.kernels.gpu.guarded import bands_are_intact, guarded


@contextlib.contextmanager
def poisoned(*, needed: bool = True) -> Iterator[list[Tensor]]:
    """Makes torch.empty and torch.empty_like give NaN (the dtype's extreme for integers), `guarded`; yields what they gave.
    AssertionError in the end when something was written beyond them, or, if one is `needed`, when there was none."""
    empty, empty_like = torch.empty, torch.empty_like
    made: list[Tensor] = []

    def poison(tensor: Tensor) -> Tensor:
        made.append(guarded(tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)))
        return made[-1]

    with (
        mock.patch.object(torch, "empty", lambda *sizes, **options: poison(empty(*sizes, **options))),
        mock.patch.object(torch, "empty_like", lambda *like, **options: poison(empty_like(*like, **options))),
    ):
        yield made
    assert made or not needed, "nothing was allocated"
    assert all(bands_are_intact(tensor) for tensor in made), "written beyond a result"
