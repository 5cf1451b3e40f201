"""Which workers a cluster has room for.

Ray places an actor on one node as a whole, and lets one wait for ever, without a word, that no node has room for. A placement
group would reserve all places or none; a job goes on with the workers that find one, so each is asked for by itself, and this
says at the start how many could.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from counterweight.pipeline.pool import START_SECONDS, PoolSize

Node = Mapping[str, float]
"""A node's resources, by Ray's names, whoever uses them."""


def room(nodes: Sequence[Node], size: PoolSize) -> int:
    """How many workers the nodes could hold if nobody else used them."""
    return sum(_places(node, size) for node in nodes)


def _places(node: Node, size: PoolSize) -> int:
    asked = {name: amount for name, amount in (("CPU", float(size.cpus)), ("GPU", size.gpus)) if amount > 0}
    # Shares of a GPU are decimal fractions, which floats only come close to.
    return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in asked.items())


STORE_SHARE = 0.75
"""Of a node's object store that hidden states may take: from 0.8 on Ray writes objects to its disk, and shards of other nodes
need a place where they are read."""


def shared_bytes(nodes: Sequence[Node], size: PoolSize) -> int:
    """What each worker can leave in the object store of its node, wherever it finds its place."""
    held = [(_places(node, size), node.get("object_store_memory", 0.0)) for node in nodes]
    shares = [int(store * STORE_SHARE) // min(places, size.workers) for places, store in held if places]
    return min(shares, default=0)


def shortage(nodes: Sequence[Node], size: PoolSize) -> str:
    """What is missing, in a line; empty where nothing is."""
    found = room(nodes, size)
    if found >= size.workers:
        return ""
    return (
        f"the cluster has room for {found} of {size.workers} workers: {resources(nodes, size)}: others are waited for"
        + ("" if found else f", up to {START_SECONDS:.0f} s")
    )


def resources(nodes: Sequence[Node], size: PoolSize) -> str:
    """What a worker asks for and what each node has."""
    have = ", ".join(_amounts(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes) or "nothing"
    return f"each asks for {_amounts(size.cpus, size.gpus)}; nodes have {have}"


def _amounts(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus and not math.isclose(gpus, 0) else "")
