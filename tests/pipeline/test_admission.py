"""Workers are counted node by node: one lies on one node as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from counterweight.pipeline.admission import room, shared_bytes, shortage
from counterweight.pipeline.pool import PoolSize

ONE, TWO = {"CPU": 1.0}, {"CPU": 2.0, "memory": 1e9}
GPU = {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "found"),
    [
        ([ONE, ONE], 1, 0.0, 2),
        ([ONE, ONE], 2, 0.0, 0),  # two CPUs in all, on no node
        ([ONE, TWO, {"CPU": 5.0}], 2, 0.0, 3),
        ([{"memory": 1e9}, TWO], 1, 0.0, 2),
        ([GPU, TWO], 1, 1.0, 1),
        ([GPU], 3, 0.25, 2),
        ([GPU], 1, 0.1, 8),
        ([{"CPU": 100.0, "GPU": 1.0}], 1, 0.1, 10),
        ([], 1, 0.0, 0),
    ],
)
def test_room(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float, found: int) -> None:
    size = PoolSize(workers=found, cpus=cpus, gpus=gpus)
    assert room(nodes, size) == found
    assert shortage(nodes, size) == ""


@pytest.mark.parametrize(
    ("workers", "nodes", "found"),
    [
        (2, [{**TWO, "object_store_memory": 800.0}], 300),  # three quarters, for two
        (1, [{**TWO, "object_store_memory": 800.0}], 600),
        (8, [{**GPU, "object_store_memory": 800.0}, {**TWO, "object_store_memory": 400.0}], 75),  # wherever it lies
        (2, [{**TWO, "object_store_memory": 800.0}, {"object_store_memory": 8.0}], 300),  # nobody finds a place there
        (2, [{**TWO, "object_store_memory": 800.0}, ONE], 0),
        (2, [], 0),
    ],
)
def test_hidden_states_take_their_share_of_the_smallest_object_store(
    workers: int, nodes: Sequence[Mapping[str, float]], found: int
) -> None:
    assert shared_bytes(nodes, PoolSize(workers=workers, cpus=1, gpus=0.0)) == found


def test_what_is_missing_is_one_line() -> None:
    assert shortage([ONE, ONE, TWO], PoolSize(workers=3, cpus=2, gpus=0.0)) == (
        "the cluster has room for 1 of 3 workers: each asks for 2 CPU; nodes have 1 CPU, 1 CPU, 2 CPU: others are waited for"
    )
    assert shortage([GPU], PoolSize(workers=1, cpus=1, gpus=2.0)) == (
        "the cluster has room for 0 of 1 workers: each asks for 1 CPU and 2 GPU; nodes have 8 CPU and 1 GPU: others are "
        "waited for, up to 300 s"
    )
