"""What a block's task works on, and what follows from that for all of its phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.matrix_bytes import DOUBLE
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.models.family import ModelFamily, is_expert
from counterweight.workers.recipe import ModuleRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears that read one input. linears: name -> [out, in]. recipe: name -> what applies, for those that are not kept.
    share: of the tokens, which reach it. scaled: whether the recipe asks for scales of the input and something before it can
    take them in."""

    linears: Mapping[str, tuple[int, int]]
    recipe: Mapping[str, ModuleRecipe]
    share: float
    scaled: bool

    @property
    def width(self) -> int:
        return next(iter(self.linears.values()))[1]

    @property
    def outputs(self) -> int:
        return sum(rows for rows, _ in self.linears.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a task works on, and where.

    family: of the model; heads: its attention's, of queries. groups: in the order in which they run, the attention's first.
    source_bytes: the block's tensors as stored. parameters: of the block. compute: bytes of an activation. shard, shards:
    tokens of a shard, and how many there are; length: of a sequence; sequences: all of them. hidden: width of the stream.
    attention_bytes: of the scores of a shard, where attention keeps them. paired: whether blocks see the compressed ones'
    outputs and the solve looks at the original's; compressed: whether they see them. stretched: whether shards come a few at a
    time. threads: that share shards and solves. gpu: whether the arithmetic is done on one. experts: how a sparse block's are
    calibrated; None in a dense one.
    """

    family: ModelFamily
    heads: int
    groups: Sequence[Group]
    source_bytes: int
    parameters: int
    compute: int
    hidden: int
    shard: int
    shards: int
    length: int
    sequences: int
    attention_bytes: int
    paired: bool
    compressed: bool
    rotation: Rotation | None
    stretched: bool
    threads: int
    gpu: bool
    experts: ExpertCalibration | None = None

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def gathered(load: Load, group: Group) -> float:
    """Share of the tokens that a group's statistics are gathered on: that which reaches it, or all where experts see all."""
    return 1.0 if _of_expert(group) and load.experts is not None and load.experts.every_token else group.share


def starving(load: Load, group: Group) -> bool:
    """Whether the average expert sees fewer tokens than the floor; that single ones do is not known ahead."""
    if load.experts is None or not load.experts.samples or not _of_expert(group):
        return False
    return load.tokens * group.share < load.experts.floor_of(group.width)


def kept_rows(load: Load) -> int:
    """Tokens of the layer that are kept for experts that may turn out to be starved."""
    samples = load.experts is not None and load.experts.samples
    return load.experts.kept_of(load.hidden, load.tokens) if samples and load.experts is not None else 0


def summed_tokens(load: Load, group: Group) -> float:
    """Tokens that a group's statistics count as when it is solved."""
    own = load.tokens * gathered(load, group)
    return own + load.experts.weight_of(group.width) if load.experts is not None and starving(load, group) else own


def _of_expert(group: Group) -> bool:
    return is_expert(next(iter(group.linears)))


def scales(part: ModuleRecipe) -> bool:
    """Whether a norm or linear before takes scales in, after which the block is another one."""
    learned = part.tuning is not None and part.tuning.transforms
    return part.smoothing is not None or learned or part.compensation.needs_rows


def streams(load: Load, group: Group) -> int:
    """How many descriptions of a group's input are looked at: as it is, quantized, as the original model has it."""
    part = next(iter(group.recipe.values()))
    return 1 + (part.activations is not None) + (load.paired and group.share == 1)


def products_of(load: Load, group: Group) -> int:
    """How many products of a group's streams are summed."""
    if not group.recipe:
        return 0
    count = streams(load, group)
    return count * (count + 1) // 2


def sums(load: Load, group: Group) -> int:
    """Bytes of a group's statistics."""
    return DOUBLE * group.width**2 * products_of(load, group)


def packed(group: Group) -> int:
    """Bytes of a group's weights as they are written."""
    return sum(part.weights.stored_bits(*group.linears[name]) // 8 for name, part in group.recipe.items())
