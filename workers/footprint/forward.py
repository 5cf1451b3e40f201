"""Memory of a block that runs: shards in flight, what is gathered of them, and training."""

from __future__ import annotations

from math import prod

from counterweight.workers.footprint.experts import gathered_share, kept_rows
from counterweight.workers.footprint.load import Group, Load, gathers, moments
from counterweight.workers.matrix_bytes import DECODE, DOUBLE, SINGLE
from counterweight.workers.parallel import AHEAD, BEHIND

LIMIT, ENOUGH = 1024, 32  # `held_out.py` and `coverage.py` say the same, but import torch


def activations(load: Load) -> int:
    """Of the shards in flight: each thread's, with the products that it has, and those of one that is being summed."""
    products = sum(_products(load, group) for group in load.groups)
    threads = min(load.threads, load.shards)
    waiting = products if load.shards > threads > 1 else 0
    if load.in_pieces:
        # Threads without a shard of their own take pieces of another's.
        waiting += (load.threads - threads) * _piece(load)
    if load.gpu:
        # Hidden states that were read for the next shards, and those that are being written.
        waiting += (AHEAD * (1 + load.paired) + BEHIND) * load.shard * load.hidden * load.compute
    return threads * running(load, stored=False) + waiting


def running(load: Load, *, stored: bool) -> int:
    """One shard in the block at the peak, with the products of the inputs that it has come by; or stored: where nothing is
    gathered, and every linear is read back before it is multiplied."""
    if load.in_pieces and not stored:
        return _shard_of_pieces(load)
    token = load.compute * load.hidden
    # What entered, the residual stream, and what the norm made of it.
    stream = 3 * token + (token if load.paired else 0) + (token if kept_rows(load) and not stored else 0)
    peaks = [load.attention_bytes]
    products = 0
    for group in load.groups:
        before = products
        products += 0 if stored else _products(load, group)
        tokens = load.shard * (group.share if stored else gathered_share(load, group))
        inside = _inside(load, group)
        read = max((prod(shape) for shape in group.linears.values()), default=0) * DECODE if stored else 0
        peaks.append(round(tokens * inside) + products + read)
        if group.recipe and not stored:
            looking, multiplying = _gathered(load, group)
            peaks.append(round(tokens * group.width * looking) + before)
            peaks.append(round(tokens * group.width * multiplying) + products)
    if (experts := load.at_once) > 1:
        peaks.append(_experts_at_once(load, experts) + products)
    return load.shard * stream + max(peaks) + _meant(load)


def _experts_at_once(load: Load, experts: int) -> int:
    """Where all experts run together: their rows, what is between their linears, and what is put together of it again."""
    group = next(group for group in load.groups if group.of_expert)
    inner = max(rows for rows, _ in group.linears.values())
    quantized = any(part.activations is not None for part in group.recipe.values())
    inside = max(group.width * (1 + 2 * quantized) + 3 * inner, inner + 3 * load.hidden)
    return round(load.compute * load.shard * group.share * experts * inside)


def _shard_of_pieces(load: Load, *, solved: bool = True) -> int:
    """One shard that runs piece by piece: what entered, what comes out, and the inputs of all linears are kept of the whole
    shard. Experts' are put together, and let go, when they are looked at, one group after the other; the others' stay, because
    the next shard takes their memory over. solved: whether products are taken of them."""
    stream = load.shard * load.compute * load.hidden
    given = stream if kept_rows(load) else 0
    entering = _entering(load)
    rows, products = sum(size for _, size in entering), 0
    peaks = [2 * stream + rows + _piece(load)]
    for group, size in entering:
        joined = size if group.of_expert else 0
        peaks.append(2 * stream + rows + joined + products)
        if solved:
            _, multiplying = _gathered(load, group)  # it is quantized piece by piece, which takes less
            products += _products(load, group)
            peaks.append(2 * stream + rows - size + size // load.compute * multiplying + products)
        rows -= joined
    return max(peaks) + given + _meant(load)


def held_out(load: Load) -> int:
    """One shard that nothing is solved on: rows of all inputs are kept, and no products are taken."""
    load = load.of_shards(load.unseen)
    return _shard_of_pieces(load, solved=False) if load.in_pieces else running(load.solving(()), stored=False)


def _entering(load: Load) -> list[tuple[Group, int]]:
    """The groups of linears that are looked at, with the bytes of what enters them of a shard."""
    return [
        (group, load.compute * round(load.shard * gathered_share(load, group)) * group.width)
        for group in load.groups
        if group.recipe
    ]


def _piece(load: Load) -> int:
    """What a piece takes while it runs, beside what is kept of it."""
    stream = 2 * load.compute * load.hidden  # the residual, and what a norm makes of it
    inside = max(round(gathered_share(load, group) * _inside(load, group)) for group in load.groups)
    return load.piece * (stream + max(inside, load.token_scores))


def _inside(load: Load, group: Group) -> int:
    """Bytes of a token between a group of linears and the next."""
    rows = [rows for rows, _ in group.linears.values()]
    if group is load.groups[0]:
        # Queries, keys and values; while they get their positions, three more of the widest.
        return load.compute * (sum(rows) + 3 * max(rows))
    # Of a gated pair: one behind its activation, the other, and their product; of an expert's the first before it too.
    more = 1 + group.of_expert if len(rows) > 1 else 0
    return load.compute * (sum(rows) + more * max(rows))


def _meant(load: Load) -> int:
    """The inputs of the linears in the original model, of a shard."""
    if not load.paired:
        return 0
    return load.compute * load.shard * sum(group.width for group in load.groups if group.recipe)


def _products(load: Load, group: Group) -> int:
    """Of a shard's streams, until they are added to the sums; on a GPU a kernel adds them as it makes them."""
    return 0 if load.gpu else moments(load, group, SINGLE)


def _gathered(load: Load, group: Group) -> tuple[int, int]:
    """Bytes of an element of an input while its moments are taken: before their products, when it is quantized, with what it
    is rounded from; and while products are taken of it, of what it was quantized to and of float32 copies of both."""
    part = next(iter(group.recipe.values()))
    copy = 0 if load.compute == SINGLE else SINGLE
    quantized = part.activations is not None and gathers(load, group)
    looking = load.compute * (3 if quantized else 1)
    multiplying = (load.compute + copy) * (1 + quantized) + (copy if load.paired and group.share == 1 else 0)
    if part.residual is not None:
        multiplying += 2 * SINGLE + DOUBLE  # magnitudes, and sorted with their places
    return looking, multiplying


def unseen_rows(load: Load, group: Group) -> int:
    """Rows of a group's input on tokens that nothing is solved on, by which what was solved is judged."""
    own = min(LIMIT, round(load.unseen * group.share))
    return min(LIMIT, load.unseen) if group.of_expert and own < ENOUGH else own


def unseen_bytes(load: Load) -> int:
    """Rows of what enters each group of linears on tokens that nothing is solved on, and of what experts are given."""
    if not load.held_out:
        return 0
    sparse = load.hidden * min(LIMIT, load.unseen) if any(group.of_expert for group in load.groups) else 0
    rows = 0
    for group in load.groups:
        if group.recipe:
            kept = min(LIMIT, round(load.unseen * group.share))
            rows += kept * group.width * (1 + (load.paired and group.share == 1))
    return load.compute * (sparse + rows)


def tuning(load: Load) -> int:
    """Training of codes: hidden states before and behind the block, of every sequence; what a step keeps of its tokens for
    gradients (the stream and its norms; inputs and outputs of linears, half of which are kept twice, behind positions and
    activation); and what linears need."""
    options = next(part.tuning for group in load.groups for part in group.recipe.values() if part.tuning is not None)
    hidden = 2 * load.compute * load.hidden * load.tokens
    kept = 10 * load.hidden + sum(group.share * (group.width + 1.5 * group.outputs) for group in load.groups)
    step = round(options.batch * load.length * load.compute * kept)
    linears = [group.linears[name] for group in load.groups for name in group.recipe]
    return hidden + step + sum(options.train_bytes(rows, columns) for rows, columns in linears)
