"""What calibration did not cover, and where the recipe could not be followed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from counterweight.pipeline.artifact.report_html.markup import Markup, tag
from counterweight.pipeline.artifact.report_html.modules import (
    ExpertTokens,
    Starved,
    describe_tokens,
    expert_tokens,
    starved,
)
from counterweight.pipeline.artifact.report_html.plots import SHARES, expert_map
from counterweight.pipeline.artifact.report_html.tables import code, figure, fold, legend, section, table
from counterweight.pipeline.artifact.report_html.text import count
from counterweight.workers.tasks.records import ModuleReport

SHOWN = 20
"""Rows of a table before the rest is folded away."""


def coverage_section(modules: Sequence[ModuleReport]) -> Markup:
    """Calibration tokens per module, and per expert where there are experts."""
    title = "Calibration coverage"
    if not modules:
        return section(title, tag("p", "No module was quantized."))
    parts: list[str] = [tag("p", describe_tokens(modules))]
    experts = expert_tokens(modules)
    if experts is not None:
        parts.append(_experts(experts))
    parts += _starved(starved(modules))
    return section(title, *parts)


def _experts(experts: ExpertTokens) -> Markup:
    bounds = [f"{bound:g}" for bound in SHARES]
    labels = [f"below {bounds[0]}", *(f"{low} to {high}" for low, high in pairwise(bounds))]
    entries = [
        ("none", "no token"),
        *((f"heat{i}", label) for i, label in enumerate([*labels, f"{bounds[-1]} and more"])),
    ]
    return figure(
        "Tokens by expert",
        legend(entries),
        expert_map(experts),
        caption="Shades: an expert's tokens as a multiple of the mean over the experts of its block.",
    )


def _starved(groups: Sequence[Starved]) -> list[Markup]:
    if not groups:
        return [tag("p", "No module saw fewer tokens than it has input columns.")]
    modules = sum(len(group.modules) for group in groups)
    none = sum(len(group.modules) for group in groups if group.tokens == 0)
    fed = sum(len(group.modules) for group in groups if group.fed)
    text = f"{count(modules, 'module')} saw too few tokens, {none:,} of them none."
    if fed:
        text += f" {fed:,} were solved on tokens of their layer beside their own."
    if modules > fed:
        text += (
            f" The statistics of {modules - fed:,} are singular, with fewer tokens than input columns: what calibration did "
            "not see was not optimized."
        )
    rows = [
        (
            code(group.parent),
            ", ".join(group.modules),
            f"{group.tokens:,}",
            ", ".join(f"{columns:,}" for columns in group.columns),
            "the layer's too" if group.fed else "these alone",
        )
        for group in groups
    ]
    head = ["under", "modules", "tokens", "input columns", "solved on"]
    return [tag("h3", "Too few tokens"), tag("p", text, class_="warning"), *_capped(head, rows)]


def fallback_section(modules: Sequence[ModuleReport]) -> Markup:
    """Every departure from the recipe with its cause."""
    rows = [
        (code(module.name), code(fallback.step), fallback.cause) for module in modules for fallback in module.fallbacks
    ]
    title = "Fall-backs"
    if not rows:
        return section(title, tag("p", "None: every module was compressed as the recipe says."))
    affected = sum(bool(module.fallbacks) for module in modules)
    text = f"{count(affected, 'module')} of {len(modules):,} could not be compressed exactly as the recipe says."
    return section(title, tag("p", text), *_capped(["module", "step", "cause"], rows))


def _capped(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Markup]:
    shown = table(head, rows[:SHOWN], class_="plain")
    if len(rows) <= SHOWN:
        return [shown]
    return [shown, fold(f"{len(rows) - SHOWN:,} more", table(head, rows[SHOWN:], class_="plain"))]
