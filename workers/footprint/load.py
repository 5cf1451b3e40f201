"""What a block's task works on, and what follows from that for all of its phases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from counterweight.workers.batches import BATCH_BYTES
from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.matrix_bytes import DOUBLE, HALF, triangle
from counterweight.workers.methods.transforms import Rotation
from counterweight.workers.models.family import ModelFamily, expert_of, is_expert
from counterweight.workers.parallel import FEW_TOKENS, piece_sequences
from counterweight.workers.recipe import ModuleRecipe
from counterweight.workers.tasks.setting import shard_sequences


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
    def of_expert(self) -> bool:
        return is_expert(next(iter(self.linears)))

    @property
    def outputs(self) -> int:
        return sum(rows for rows, _ in self.linears.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a task works on, and where.

    family: of the model; heads: its attention's, of queries. groups: in the order in which they run, the attention's first.
    source_bytes: the block's tensors as stored. parameters: of the block. compute: bytes of an activation. hidden: width of the
    stream. shard: tokens of the largest shard of any kind; shards: how many are solved on; length: of a sequence; sequences:
    all that are solved on; drawn: further ones, that some experts are; held_out: further ones, that nothing is. token_scores:
    bytes of the attention's scores of a token, where it keeps them. paired: whether blocks see the compressed ones' outputs and
    the solve looks at the original's; compressed: whether they see them. passed: whether the original is run over the tokens
    before, for segments behind. stretched: whether shards come a few at a time. threads: that share shards and solves. gpu:
    whether the arithmetic is done on one. experts, passes, batch_bytes: see `BlockSpec`.
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
    token_scores: int
    paired: bool
    compressed: bool
    rotation: Rotation | None
    stretched: bool
    threads: int
    gpu: bool
    passed: bool = False
    experts: ExpertCalibration | None = None
    passes: tuple[tuple[str, ...], ...] = ()
    drawn: int = 0
    held_out: int = 0
    batch_bytes: int = BATCH_BYTES[False]

    @property
    def tokens(self) -> int:
        """That are solved on."""
        return self.sequences * self.length

    @property
    def drawn_tokens(self) -> int:
        """Further ones, that experts are solved on which see too few."""
        return self.drawn * self.length

    @property
    def unseen(self) -> int:
        """Further ones, that nothing is solved on."""
        return self.held_out * self.length

    @property
    def piece(self) -> int:
        """Tokens of a shard that a thread runs at a time."""
        return self.shard if self.gpu else min(self.shard, piece_sequences(self.length) * self.length)

    @property
    def in_pieces(self) -> bool:
        """Whether a shard is more than one of them."""
        return self.piece < self.shard

    @property
    def attention_bytes(self) -> int:
        """Of the scores of a shard."""
        return self.shard * self.token_scores

    @property
    def all_tokens(self) -> int:
        """That run through the block."""
        return self.tokens + self.drawn_tokens + self.unseen

    @property
    def all_shards(self) -> int:
        """In which these come: those of a kind in shards of their own."""
        return self.shards + sum(-(-kind // shard_sequences(self.length)) for kind in (self.drawn, self.held_out))

    @property
    def lends(self) -> bool:
        """See `BlockSpec`."""
        return len(self.passes) > 1 and not any(part.tuning for group in self.groups for part in group.recipe.values())

    @property
    def at_once(self) -> int:
        """Experts of a shard that run together, see `workers.models.at_once`; 1 where each runs by itself."""
        of_experts = [group for group in self.groups if group.of_expert]
        if not self.gpu or self.compute != HALF or not of_experts or self.shard * of_experts[0].share >= FEW_TOKENS:
            return 1
        layout = self.family.experts
        apart = layout is not None and (layout.scaled_inputs or layout.fused_biases_on_disk is not None)
        if apart or any(self._transformed(name, group.width) for group in of_experts for name in group.linears):
            return 1
        return len({expert_of(name) for group in of_experts for name in group.linears})

    def _transformed(self, name: str, columns: int) -> bool:
        """Whether the input of a linear is transformed while the block runs."""
        rotation = self.rotation
        return rotation is not None and rotation.online_size(self.family, name, columns, self.heads) is not None

    def by_pass(self) -> list[Load]:
        """The same with the recipes of one pass's linears alone, pass by pass."""
        return [self.solving(names) for names in self.passes] or [self]

    def of_shards(self, tokens: int) -> Load:
        """The same on shards of one kind, of which there are so many tokens in all."""
        return replace(self, shard=min(self.shard, tokens))

    def solving(self, names: Iterable[str]) -> Load:
        """The same where only the groups of the linears `names` are looked at."""
        own = set(names)
        groups = [group if not own.isdisjoint(group.linears) else replace(group, recipe={}) for group in self.groups]
        return replace(self, groups=groups)

    def with_only(self, names: Iterable[str]) -> Load:
        """The same of the groups of the linears `names`, as if the block had no others."""
        own = set(names)
        return replace(self, groups=[group for group in self.groups if not own.isdisjoint(group.linears)])


def scales(part: ModuleRecipe) -> bool:
    """Whether a norm or linear before takes scales in, after which the block is another one."""
    learned = part.tuning is not None and part.tuning.transforms
    return part.smoothing is not None or learned or part.compensation.needs_rows


def streams(load: Load, group: Group) -> int:
    """How many descriptions of a group's input are looked at: as it is, quantized, as the original model has it."""
    part = next(iter(group.recipe.values()))
    return 1 + (part.activations is not None) + (load.paired and group.share == 1)


def gathers(load: Load, group: Group) -> bool:
    """Whether products of a group's input are gathered: where the recipe needs them, and where errors follow from them."""
    return bool(group.recipe) and (not load.held_out or any(part.needs_products for part in group.recipe.values()))


def moments(load: Load, group: Group, itemsize: int) -> int:
    """Bytes of the products of a group's streams: triangles of each with itself, squares of each two."""
    if not gathers(load, group):
        return 0
    count = streams(load, group)
    return itemsize * (count * triangle(group.width) + count * (count - 1) // 2 * group.width**2)


def squares(load: Load, group: Group) -> int:
    """Bytes of a group's statistics when somebody solves with them."""
    if not gathers(load, group):
        return 0
    count = streams(load, group)
    return DOUBLE * group.width**2 * (count * (count + 1) // 2)


def packed(group: Group) -> int:
    """Bytes of a group's weights as they are written."""
    return sum(part.weights.stored_bits(*group.linears[name]) // 8 for name, part in group.recipe.items())


def factors(group: Group) -> int:
    """Bytes of the factors of a group's branches as they are written, at most."""
    found = 0.0
    for name, part in group.recipe.items():
        rank, bits = part.compensation.branch_rank, part.compensation.branch_bits
        if rank is not None:
            found += rank.at_most(*group.linears[name]) * sum(group.linears[name]) * (16 if bits is None else bits) / 8
    return round(found)
