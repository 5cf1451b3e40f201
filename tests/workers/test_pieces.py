"""A shard in pieces: threads without a shard of their own take some, and no bit says which thread took what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from counterweight.kernels.forms import ActivationFormat
from counterweight.workers.block import compress
from counterweight.workers.calibration.row_sample import RowSample
from counterweight.workers.calibration.statistics import Gathering, InputStatistics, ShardMoments
from counterweight.workers.calibration.triangle import TRIANGLE_BLOCK
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.family import is_expert
from counterweight.workers.parallel import OrderedPool, SideBySide
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.shards import RunningStatistics, run_shards
from counterweight.workers.solve import solve
from tests.patience import PATIENCE
from tests.workers.test_block import block_of, loaders, shards

GATHERING = Gathering(activations=ActivationFormat(bits=4), absolute=True, thresholds=True)
HIDDEN = {
    "small shards behind a large one": [shards(1, sequences=count, length=7)[0] for count in (9, 3, 2)],
    "one sequence": shards(1, sequences=1, length=45),
    "sequences longer than a piece": shards(2, sequences=3, length=23),
}


def ran(
    block: Block, hidden: list[Tensor], threads: int, piece_tokens: int | None, **more: Any
) -> tuple[RunningStatistics, list[Tensor]]:
    pool = OrderedPool(threads)
    side_by_side = SideBySide(pool)
    side_by_side.piece_tokens = piece_tokens
    originals = loaders([0.9 * shard for shard in hidden])
    sums = RunningStatistics(block, dict.fromkeys(block.groups, GATHERING), **more)
    outputs = run_shards(block, loaders(hidden), lambda output: output, sums, side_by_side, originals)
    pool.close()
    return sums, outputs


def tensors(found: InputStatistics) -> Iterator[Tensor]:
    yield from (found.product(pair) for pair in ("xx", "yy", "xy", "tx"))
    assert found.absolute is not None
    assert found.thresholds is not None
    yield from (found.absolute, found.thresholds, torch.tensor(found.tokens))


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize(("case", "every_token"), [("llama", False), ("mixtral", False), ("mixtral", True)])
def test_threads_change_no_bit_and_pieces_no_row(case: str, every_token: bool, hidden: list[Tensor]) -> None:
    block = block_of(case)

    def of(threads: int, piece_tokens: int | None) -> tuple[RunningStatistics, list[Tensor]]:
        return ran(block, hidden, threads, piece_tokens, every_token=every_token, sample=RowSample(20))

    one, outputs = of(1, 16)
    rows, statistics = one.take_rows(), one.result()
    for threads, piece_tokens in ((2, 16), (4, 16), (1, None)):
        again, others = of(threads, piece_tokens)
        rows_again, found = again.take_rows(), again.result()
        exact = {"rtol": 0.0, "atol": 0.0} if piece_tokens else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(others, outputs, **exact)
        torch.testing.assert_close(rows_again, rows, **exact)
        assert set(found) == set(statistics)
        for group in found:
            # With another shape a product may round otherwise, and a token choose another expert.
            if piece_tokens or not is_expert(group[0]):
                torch.testing.assert_close(list(tensors(found[group])), list(tensors(statistics[group])), **exact)


def meeting(call: Callable[..., Any], threads: int) -> Callable[..., Any]:
    """The same, where each call waits for as many threads as there are to make one; a thread that makes none fails the test."""
    barrier = threading.Barrier(threads, timeout=PATIENCE)

    def together(*arguments: Any, **named: Any) -> Any:
        barrier.wait()
        return call(*arguments, **named)

    return together


@pytest.mark.parametrize("threads", [2, 4])
def test_all_threads_run_pieces_of_one_shard(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of("llama")
    monkeypatch.setattr(Block, "run", meeting(Block.run, threads))
    ran(block, shards(1, sequences=4 * threads, length=8), threads, 16)


def test_all_threads_multiply_the_rows_of_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight strips of the triangle in one call."""
    pool = OrderedPool(2)
    monkeypatch.setattr(torch, "mm", meeting(torch.mm, 2))
    ShardMoments.of(torch.ones(16, 8 * TRIANGLE_BLOCK), Gathering(), None, pool.share)
    pool.close()


def test_narrow_linears_are_solved_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ModuleRecipe.model_validate(
        {"weights": {"bits": 4}, "activations": None, "compensation": {"kind": "none"}}
    )
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    groups = [(f"linear{index}",) for index in range(4)]
    weights = {name: x[:, :].clone() for (name,) in groups}

    def solved(threads: int) -> Any:
        pool = OrderedPool(threads)
        linears, _ = compress(
            weights,
            {group: InputStatistics.of(x) for group in groups},
            dict.fromkeys(weights, recipe),
            scale_dtypes=dict.fromkeys(weights, torch.float32),
            factor_dtypes=dict.fromkeys(weights, torch.float32),
            batch_bytes=0,
            pool=pool,
        )
        pool.close()
        return {name: linear.weight.dequantize() for name, linear in linears.items()}

    alone = solved(1)
    monkeypatch.setattr("counterweight.workers.block.solve", meeting(solve, 2))
    together = solved(2)
    assert all(torch.equal(together[name], alone[name]) for name in weights)
