"""How much memory a block's task takes, phase by phase: what every step says of itself, put together. Torch-free.

A task reads a block, runs it over its shards, solves its linears and writes what became of them. Each phase has what stays of
those before it and a peak of its own; the task's peak is the largest of them, not their sum. On a GPU the arithmetic and what
it reads lie on the device; the source's tensors, and what is written, on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from counterweight.workers import matrix_bytes
from counterweight.workers.matrix_bytes import DECODE, DOUBLE, SINGLE
from counterweight.workers.parallel import PARALLEL_WIDTH
from counterweight.workers.recipe import ModuleRecipe, Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears that read one input. linears: name -> [out, in]. recipe: name -> what applies, for those that are not kept.
    share: of the tokens, which reach it."""

    linears: Mapping[str, tuple[int, int]]
    recipe: Mapping[str, ModuleRecipe]
    share: float

    @property
    def width(self) -> int:
        return next(iter(self.linears.values()))[1]

    @property
    def outputs(self) -> int:
        return sum(rows for rows, _ in self.linears.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a task works on, and where.

    source_bytes: the block's tensors as stored; itemsize: of an element of them, on average. parameters: of the block.
    compute: bytes of an activation. shard, shards: tokens of a shard, and how many there are. hidden: width of the stream.
    attention_bytes: of the scores of a shard, where attention keeps them. paired: whether blocks see the compressed ones'
    outputs and the solve looks at the original's; compressed: whether they see them. threads: that share shards and solves.
    gpu: whether the arithmetic is done on one.
    """

    groups: Sequence[Group]
    source_bytes: int
    parameters: int
    compute: int
    hidden: int
    shard: int
    shards: int
    attention_bytes: int
    paired: bool
    compressed: bool
    rotation: Rotation | None
    threads: int
    gpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a block's task.

    weights: as they were read and as they run. statistics: the sums. activations: of the shards in flight, with their own
    products. solve: at its peak, beside weights, statistics and what is solved already. phases: name -> everything that is in
    memory where the arithmetic is done, at that phase's peak. host: beside that on the host of a GPU; 0 without one.
    """

    weights: int
    statistics: int
    activations: int
    solve: int
    phases: Mapping[str, int]
    host: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


def footprint(load: Load) -> Footprint:
    """The memory of a block's task."""
    parts = [part for group in load.groups for part in group.recipe.values()]
    weights = _with_running(load, _scaled(load))
    statistics = sum(_sums(load, group) for group in load.groups)
    products = sum(SINGLE * group.width**2 * products_of(load, group) for group in load.groups)
    first = sum(DOUBLE * group.width**2 for group in load.groups if group.recipe)
    whole = max((DOUBLE * group.width**2 for group in load.groups if group.recipe), default=0)
    activations = _activations(load)
    solving, solved = _solving(load)
    phases = {
        "load": _loading(load),
        "prepare": _preparing(load),
        # Before the first products there are only the sums of xx; at last each sum is made symmetric.
        "forward": weights
        + max(activations + (statistics if load.shards > 1 else first), statistics + max(products, whole)),
        "solve": weights + statistics + solving,
        "write": weights + statistics + solved + sum(_packed(group) for group in load.groups),
    }
    if any(part.tuning is not None for part in parts):
        phases["tune"] = weights + statistics + _tuning(load)
    if load.compressed:
        phases["propagate"] = weights + statistics + solved + load.threads * _running(load, stored=True)
    host = 0
    if load.gpu:
        host = max(load.source_bytes + _unscaled(load), _scaled(load)) + max(
            load.shard * load.hidden * load.compute * 2, sum(_packed(group) for group in load.groups)
        )
    return Footprint(
        weights=weights, statistics=statistics, activations=activations, solve=solving, phases=phases, host=host
    )


def _unscaled(load: Load) -> int:
    """The block's parameters as they are read, in the recipe's coordinates: rotated ones are float32."""
    return load.source_bytes if load.rotation is None else SINGLE * load.parameters


def _scaled(load: Load) -> int:
    """The same as they are solved: those whose inputs were scaled are float32."""
    scaled = any(_scales(part) for group in load.groups for part in group.recipe.values())
    return SINGLE * load.parameters if scaled else _unscaled(load)


def _with_running(load: Load, read: int) -> int:
    """Parameters and what runs of them. On a CPU that is one tensor where the dtype is the same. On a GPU what was read lies on
    the host, but `compress` puts the linears that it solves beside those that run."""
    running = load.compute * load.parameters
    return read if read == running and not load.gpu else read + running


def _loading(load: Load) -> int:
    """Reading, rotating and filling the block, which is done on the host until it runs."""
    if load.gpu:
        return load.compute * load.parameters
    before = _with_running(load, _unscaled(load))
    if load.rotation is None:
        return before
    widest = max((shape for group in load.groups for shape in group.linears.values()), key=prod, default=(0, 0))
    return max(before, load.source_bytes + _unscaled(load) + load.rotation.rotate_bytes(*widest))


def _scales(part: ModuleRecipe) -> bool:
    """Whether a norm or linear before takes scales in, after which the block is another one."""
    learned = part.tuning is not None and part.tuning.transforms
    return part.smoothing is not None or learned or part.compensation.needs_rows


def _streams(load: Load, group: Group) -> int:
    part = next(iter(group.recipe.values()))
    return 1 + (part.activations is not None) + (load.paired and group.share == 1)


def products_of(load: Load, group: Group) -> int:
    """How many products of a group's streams are summed."""
    if not group.recipe:
        return 0
    streams = _streams(load, group)
    return streams * (streams + 1) // 2


def _sums(load: Load, group: Group) -> int:
    return DOUBLE * group.width**2 * products_of(load, group)


def _activations(load: Load) -> int:
    """Of the shards in flight: each thread's, with the products that it has, and those of one that is being summed."""
    products = sum(SINGLE * group.width**2 * products_of(load, group) for group in load.groups)
    threads = min(load.threads, load.shards)
    waiting = products if load.shards > threads > 1 else 0
    return threads * _running(load, stored=False) + waiting


def _running(load: Load, *, stored: bool) -> int:
    """One shard in the block at the peak, with the products of the inputs that it has come by; or stored: where nothing is
    gathered, and every linear is read back before it is multiplied."""
    token = load.compute * load.hidden
    # What entered, the residual stream, and what the norm made of it.
    stream = 3 * token + (token if load.paired else 0)
    peaks = [load.attention_bytes]
    products = 0
    for group in load.groups:
        before = products
        products += 0 if stored else SINGLE * group.width**2 * products_of(load, group)
        tokens = load.shard * group.share
        rows = [rows for rows, _ in group.linears.values()]
        if group is load.groups[0]:
            # Queries, keys and values; while they get their positions, three more of the widest.
            inside = load.compute * (sum(rows) + 3 * max(rows))
        else:
            # Of a gated pair: one behind its activation, the other, and their product.
            inside = load.compute * (sum(rows) + (max(rows) if len(rows) > 1 else 0))
        read = max((prod(shape) for shape in group.linears.values()), default=0) * DECODE if stored else 0
        peaks.append(round(tokens * inside) + products + read)
        if group.recipe and not stored:
            looking, multiplying = _gathered(load, group)
            peaks.append(round(tokens * group.width * looking) + before)
            peaks.append(round(tokens * group.width * multiplying) + products)
    meant = load.compute * load.shard * sum(group.width for group in load.groups if group.recipe) if load.paired else 0
    return load.shard * stream + max(peaks) + meant


def _gathered(load: Load, group: Group) -> tuple[int, int]:
    """Bytes of an element of an input while its moments are taken: before their products, when it is quantized, with what it
    is rounded from; and while products are taken of it, of what it was quantized to and of float32 copies of both."""
    part = next(iter(group.recipe.values()))
    copy = 0 if load.compute == SINGLE else SINGLE
    quantized = part.activations is not None
    looking = load.compute * (3 if quantized else 1)
    multiplying = (load.compute + copy) * (1 + quantized) + (copy if load.paired and group.share == 1 else 0)
    if part.residual is not None:
        multiplying += 2 * SINGLE + DOUBLE  # magnitudes, and sorted with their places
    return looking, multiplying


def _preparing(load: Load) -> int:
    """Choices from the first shard's rows, before there are statistics; then the block that is scaled, beside what it was."""
    before = _with_running(load, _unscaled(load))
    curious = [group for group in load.groups if any(_scales(part) for part in group.recipe.values())]
    if not curious:
        return before
    rows = sum(SINGLE * min(2048, load.shard) * group.width for group in curious)
    peaks = []
    for group in curious:
        part = next(iter(group.recipe.values()))
        copies = 0 if _unscaled(load) == SINGLE * load.parameters else SINGLE * group.outputs * group.width
        searching = 0 if part.smoothing is None else part.smoothing.search_bytes(group.outputs, group.width)
        peaks.append(copies + searching)
    return before + max(rows + max(peaks), SINGLE * load.parameters)


def _solving(load: Load) -> tuple[int, int]:
    """The largest sum of solves that run side by side, with what was solved before; and what all solves leave."""
    jobs = [job for group in load.groups for job in _jobs(load, group)]
    side_by_side = load.threads if any(group.width >= PARALLEL_WIDTH for group in load.groups if group.recipe) else 1
    peak = solved = 0
    for first in range(len(jobs)):
        peak = max(peak, solved + sum(peak for peak, _ in jobs[first : first + side_by_side]))
        solved += jobs[first][1]
    return peak, solved


def _jobs(load: Load, group: Group) -> list[tuple[int, int]]:
    """Solves of a group's linears: the peak of each, and what it leaves. Linears with one recipe are stacked."""
    waiting = dict(group.recipe)
    found: list[tuple[int, int]] = []
    while waiting:
        first = next(iter(waiting))
        part = waiting[first]
        alone = not part.weights.rows_are_independent
        together = [first] if alone else [name for name, other in waiting.items() if other == part]
        for name in together:
            del waiting[name]
        shapes = [group.linears[name] for name in together]
        tokens = load.shard * load.shards * group.share
        left = sum(_left(part, rows, columns, load.source_bytes / load.parameters) for rows, columns in shapes)
        copies = 0 if _scaled(load) == SINGLE * load.parameters else SINGLE * sum(map(prod, shapes))
        found.append((copies + _solve(part, shapes, tokens, _streams(load, group)), left))
    return found


def _solve(part: ModuleRecipe, shapes: Sequence[tuple[int, int]], tokens: float, streams: int) -> int:
    """Peak of one call of `solve`, beside its weights."""
    columns = shapes[0][1]
    rows = sum(rows for rows, _ in shapes)
    judging = max(_judging(part, one, columns, streams) for one, _ in shapes)
    if part.compensation.joint:
        return max(judging, *(part.compensation.solve_bytes(part.weights, one, columns, tokens) for one, _ in shapes))
    stacked = SINGLE * rows * columns
    taken = stacked if part.compensation.needs_rows else 0
    foreseen = part.compensation.foresee_bytes(columns)
    quantizing = max(part.weights.quantize_bytes(rows, columns) + foreseen // 4, foreseen)
    target = part.weights.target_bytes(rows, columns)
    aimed = stacked if target else 0
    codes = 2 * rows * columns
    compensating = max(SINGLE * one * columns + part.compensation.fit_bytes(one, columns, tokens) for one, _ in shapes)
    return stacked + max(target, taken + aimed + max(quantizing, codes + max(judging, compensating)))


def _judging(part: ModuleRecipe, rows: int, columns: int, streams: int) -> int:
    """The errors of a solved linear: it is read back, turned round, added to the rest (or kept apart, where there are more
    streams), and its product with the statistics taken; and the store of what is left."""
    entries = SINGLE * rows * columns
    branch = 0 if part.compensation.branch_rank is None else entries
    held = 2 * entries + branch + (entries if streams == 1 else 0)
    residual = 0 if part.residual is None else part.residual.store_bytes(rows, columns) + branch + 2 * entries
    return max(held + matrix_bytes.trace(rows, columns), entries + DECODE * rows * columns, residual)


def _left(part: ModuleRecipe, rows: int, columns: int, itemsize: float) -> int:
    """What is kept of a solved linear until it is written: codes of a byte, or of the bits that a byte holds, and scales; its
    residual store; and the branch's factors, in the source's dtype of `itemsize` bytes."""
    stored = part.weights.stored_bits(rows, columns) // 8
    codes = max(stored, rows * columns) if part.weights.code_bits > 1 else stored
    residual = 0 if part.residual is None else rows * columns // 2
    rank, bits = part.compensation.branch_rank, part.compensation.branch_bits
    branch = 0 if rank is None else rank.at_most(rows, columns) * (rows + columns)
    return codes + residual + round(branch * (itemsize if bits is None else bits / 8))


def _packed(group: Group) -> int:
    return sum(part.weights.stored_bits(*group.linears[name]) // 8 for name, part in group.recipe.items())


def _tuning(load: Load) -> int:
    """Training of codes: hidden states before and behind the block, of every sequence, and what one linear after the other
    needs."""
    options = next(part.tuning for group in load.groups for part in group.recipe.values() if part.tuning is not None)
    hidden = 2 * load.compute * load.hidden * load.shard * load.shards
    linears = [group.linears[name] for group in load.groups for name in group.recipe]
    return hidden + sum(options.train_bytes(rows, columns) for rows, columns in linears)
