"""Which windows of a validation each worker measures, and which of them one task runs through the original."""

from __future__ import annotations

from collections.abc import Sequence

from counterweight.workers.parallel import piece_sequences
from counterweight.workers.tasks.setting import shard_sequences

READ_TOKENS = 1 << 19
"""Tokens that a GPU runs through a model in about the time in which the model is read: an H100 at 2.5 GB/s of storage takes
380 thousand of a dense one, 1.4 million of Mixtral (`pipeline.rates`)."""


def shares(windows: int, length: int, workers: int, *, gpu: bool) -> list[range]:
    """The windows of each worker: those that run together stay together, because the last bits of a matrix product may depend
    on its number of rows (an expert's few tokens). On a GPU these are batches, on a CPU pieces of one."""
    batch, piece = shard_sequences(length), piece_sequences(length)
    grain = piece if not gpu and batch % piece == 0 else batch
    share = -(-windows // (grain * workers)) * grain
    return [range(start, min(start + share, windows)) for start in range(0, windows, share)]


def original_shares(windows: int, length: int, workers: int, *, gpu: bool) -> list[list[range]]:
    """The windows of each worker, those together that one task runs through the original."""
    each = shares(windows, length, workers, gpu=gpu)
    tasks = min(len(each), -(-windows * length // READ_TOKENS)) if gpu else len(each)
    together = -(-len(each) // tasks)
    return [each[first : first + together] for first in range(0, len(each), together)]


def originals_first(divided: Sequence[Sequence[range]]) -> bool:
    """Whether workers begin with the original, before the blocks: each of its tasks takes longer than a block, so that at the
    end of the blocks one would run alone. One worker has nobody to wait for. divided: by `original_shares`."""
    return sum(map(len, divided)) > 1
