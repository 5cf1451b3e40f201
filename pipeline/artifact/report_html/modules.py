"""What a report's modules say together: errors by kind and block, tokens by expert, and who got too few."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from counterweight.pipeline.artifact.report_html.text import count
from counterweight.workers.models.families import families
from counterweight.workers.tasks.records import STARVED, ModuleReport

KINDS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""The order of a block's linears on the page; kinds that are not listed follow as they come."""

EXPERT_PARTS = {
    part: label
    for family in families().values()
    if family.experts is not None
    for part, label in family.experts.labels.items()
}
"""What experts' linears are called, where their names on disk say nothing to a reader."""

PARTS = {prefix: label for family in families().values() for prefix, label in family.labels.items()}
"""What a report puts before the last part of names with a prefix, where the last part alone would say too little."""

OTHER = "other"

_BLOCK = re.compile(r"(?:^|\.)layers\.([0-9]{1,6})\.")
_EXPERT = re.compile(r"\.experts\.([0-9]{1,6})\.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module stands. kind: its role, the same in every block."""

    block: int
    expert: int | None
    kind: str


def place_of(name: str) -> Place:
    """From names such as `model.layers.3.self_attn.q_proj`; what is not of that form is of kind `other` in block 0."""
    block, expert = _BLOCK.search(name), _EXPERT.search(name)
    part = name.rpartition(".")[2]
    if block is None or not part:
        return Place(0, None, OTHER)
    if expert is None:
        within = name[block.end() :]
        label = next((label for prefix, label in PARTS.items() if within.startswith(prefix)), "")
        return Place(int(block[1]), None, f"{label}{part}")
    return Place(int(block[1]), int(expert[1]), f"experts: {EXPERT_PARTS.get(part, part)}")


@dataclass(frozen=True, slots=True)
class Spread:
    """Relative output errors of the modules of one kind in one block, before and after compensation, in one order."""

    block: int
    names: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One kind over all blocks. unmeasured: modules without an error."""

    kind: str
    spreads: tuple[Spread, ...]
    unmeasured: int

    @property
    def before(self) -> list[float]:
        return [value for spread in self.spreads for value in spread.before]

    @property
    def after(self) -> list[float]:
        return [value for spread in self.spreads for value in spread.after]

    @property
    def several(self) -> bool:
        """Whether a block has several modules of this kind."""
        return any(len(spread.names) > 1 for spread in self.spreads)


def by_kind(modules: Iterable[ModuleReport]) -> dict[str, list[ModuleReport]]:
    """The modules of each kind, kinds in the order of a block's computation."""
    found: dict[str, list[ModuleReport]] = {}
    for module in modules:
        found.setdefault(place_of(module.name).kind, []).append(module)
    return {kind: found[kind] for kind in sorted(found, key=_rank)}


def panels(modules: Iterable[ModuleReport]) -> list[Panel]:
    """The modules by kind, kinds in the order of a block's computation, blocks ascending."""
    kinds: dict[str, dict[int, list[tuple[str, float, float]]]] = {}
    unmeasured: dict[str, int] = {}
    for module in modules:
        place = place_of(module.name)
        blocks = kinds.setdefault(place.kind, {})
        if module.error_before is None or module.error_after is None:
            unmeasured[place.kind] = unmeasured.get(place.kind, 0) + 1
        else:
            measured = (module.name, module.error_before, module.error_after)
            blocks.setdefault(place.block, []).append(measured)
    return [
        Panel(
            kind,
            tuple(
                Spread(
                    block,
                    tuple(name for name, _, _ in found),
                    tuple(before for _, before, _ in found),
                    tuple(after for _, _, after in found),
                )
                for block, found in sorted(kinds[kind].items())
            ),
            unmeasured.get(kind, 0),
        )
        for kind in sorted(kinds, key=_rank)
    ]


def measured_on(module: ModuleReport) -> str:
    """The tokens that a module's errors are of."""
    if module.held_out is None:
        return "in-sample"
    return f"{module.held_out.tokens:,} held out" + (", its layer's" if module.held_out.of_layer else "")


def _rank(kind: str) -> tuple[bool, int]:
    # Sorting is stable, so kinds of equal rank stay in the order in which the report has them.
    plain = kind.removeprefix("experts: ")
    known = {"gate (w1)": "gate_proj", "up (w3)": "up_proj", "down (w2)": "down_proj"}.get(plain, plain)
    return plain != kind, KINDS.index(known) if known in KINDS else len(KINDS)


def middle(values: Sequence[float]) -> float | None:
    """The median, or None of nothing."""
    return median(values) if values else None


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """tokens: (block, expert) -> calibration tokens that reached it. mean: block -> tokens of its average expert.
    Blocks and experts ascend."""

    blocks: tuple[int, ...]
    experts: tuple[int, ...]
    tokens: dict[tuple[int, int], int]
    mean: dict[int, float]

    def share(self, block: int, expert: int) -> float:
        """The expert's tokens as a multiple of the block's mean; 0 in a block without tokens."""
        mean = self.mean[block]
        return self.tokens[block, expert] / mean if mean else 0.0


def expert_tokens(modules: Iterable[ModuleReport]) -> ExpertTokens | None:
    """Tokens by expert, or None for a model without experts."""
    tokens: dict[tuple[int, int], int] = {}
    for module in modules:
        place = place_of(module.name)
        if place.expert is not None:
            where = (place.block, place.expert)
            tokens[where] = min(module.tokens, tokens.get(where, module.tokens))
    if not tokens:
        return None
    rows: dict[int, list[int]] = {}
    for (block, _), number in tokens.items():
        rows.setdefault(block, []).append(number)
    return ExpertTokens(
        blocks=tuple(sorted(rows)),
        experts=tuple(sorted({expert for _, expert in tokens})),
        tokens=tokens,
        mean={block: mean(row) for block, row in rows.items()},
    )


@dataclass(frozen=True, slots=True)
class Starved:
    """Modules under one parent that saw too few tokens. fed: they were solved on tokens of their layer beside their own."""

    parent: str
    modules: tuple[str, ...]
    tokens: int
    columns: tuple[int, ...]
    fed: bool


def starved(modules: Iterable[ModuleReport]) -> list[Starved]:
    """Fewest tokens first: experts below their floor, and whatever saw less than one token per column, so that its Gram matrix
    is singular and some directions were never seen."""
    found: dict[tuple[str, int, bool], list[tuple[str, int]]] = {}
    for module in modules:
        fed = any(fallback.step == STARVED for fallback in module.fallbacks)
        if fed or module.tokens < module.columns:
            parent, _, part = module.name.rpartition(".")
            found.setdefault((parent, module.tokens, fed), []).append((part, module.columns))
    groups = [
        Starved(parent, tuple(part for part, _ in parts), tokens, tuple(sorted({columns for _, columns in parts})), fed)
        for (parent, tokens, fed), parts in found.items()
    ]
    return sorted(groups, key=lambda group: group.tokens)


def describe_tokens(modules: Sequence[ModuleReport]) -> str:
    """How many tokens the modules saw."""
    fewest, most = min(m.tokens for m in modules), max(m.tokens for m in modules)
    if fewest == most:
        return f"Every module saw {count(most, 'token')}."
    return f"Modules saw between {fewest:,} and {count(most, 'token')}."
