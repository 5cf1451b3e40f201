"""report.html: a report as one page that needs nothing beside itself, neither network nor script."""

from __future__ import annotations

from collections.abc import Callable

import yaml

from counterweight.pipeline.artifact.report import Quality, Report, TokensReport
from counterweight.pipeline.artifact.report_html import cost, making, quality
from counterweight.pipeline.artifact.report_html.coverage import coverage_section, fallback_section
from counterweight.pipeline.artifact.report_html.judged import judged_sections
from counterweight.pipeline.artifact.report_html.markup import Markup, tag
from counterweight.pipeline.artifact.report_html.modules import measured_on, middle
from counterweight.pipeline.artifact.report_html.spectra import spectra_section
from counterweight.pipeline.artifact.report_html.style import STYLE
from counterweight.pipeline.artifact.report_html.tables import code, facts, fold, section, table
from counterweight.pipeline.artifact.report_html.text import NONE, count, percent, recipe_line
from counterweight.workers.tasks.records import ModuleReport

FIRST = 50
"""Modules of a table in another order."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Even if a string escaped its quotes, a browser would load nothing and run nothing."""


def document(title: str, main: Markup) -> str:
    """A whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="counterweight"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def render(report: Report) -> str:
    """The page: UTF-8 text, the same for equal reports. Every string of the report is escaped."""
    main = tag(
        "main",
        _header(report),
        quality.result_section(report),
        judged_sections(report),
        cost.bits_section(report),
        quality.error_section(report),
        *spectra_section(report),
        coverage_section(report.modules),
        fallback_section(report.modules),
        cost.task_section(report),
        *making.earlier_section(report),
        *making.making_section(report),
        _data_section(report),
        _details(report),
        tag("footer", f"Report of schema version {report.schema_version}, made from report.json beside this page."),
    )
    return document(f"{report.name} · Counterweight report", main)


def _header(report: Report) -> Markup:
    model = report.model
    return tag(
        "header",
        tag("p", "Counterweight report", class_="eyebrow"),
        tag("h1", report.name),
        tag("p", recipe_line(report.recipe), class_="recipe"),
        facts(
            [
                ("id", code(report.id)),
                (
                    "model",
                    tag("span", code(model.uri), f" ({model.model_type}, {count(model.parameters, 'parameter')})"),
                ),
                ("created", report.created),
                *([] if (sizes := making.size_line(report)) is None else [("size", sizes)]),
            ]
        ),
        tag("div", *_tiles(report), class_="tiles"),
    )


def _tiles(report: Report) -> list[Markup]:
    tiles: list[Markup] = []
    baseline, compensated = report.baseline, report.compensated
    if baseline is None or compensated is None:
        tiles.append(_tile("perplexity", NONE, "not validated: nothing was measured on text"))
    else:
        label = "perplexity" if report.compensated_prefill is None else "perplexity, decoding"
        tiles.append(_tile(label, f"{compensated.perplexity:.3f}", _against(compensated, baseline)))
        tiles.append(_tile("KL divergence", f"{compensated.kl:.3g}", "nats per token, from the original"))
    closed = quality.gap_closed(report, compensated)
    if closed is not None:
        tiles.append(_tile("gap closed", percent(closed), "of the perplexity that quantization cost"))
    bits = report.bits_per_weight
    tiles.append(_tile("bits per weight", f"{bits.total:.3f}", f"all in; {bits.model:.3f} over the whole model"))
    before = middle([m.error_before for m in report.modules if m.error_before is not None])
    after = middle([m.error_after for m in report.modules if m.error_after is not None])
    if len(tiles) < 4 and before is not None and after is not None:
        note = "median relative output error" + ("" if report.calibration.held_out else ", in-sample")
        if quality.has_branches(report):
            note += f", {before:.2e} without compensation"
        tiles.append(_tile("output error", f"{after:.2e}", note))
    return tiles


def _against(quality: Quality, baseline: Quality) -> str:
    if baseline.perplexity <= 0:
        return f"original {baseline.perplexity:.3f}"
    return f"{quality.perplexity / baseline.perplexity:.4f} × the original's {baseline.perplexity:.3f}"


def _tile(label: str, value: str, note: str) -> Markup:
    return tag(
        "div",
        tag("div", label, class_="label"),
        tag("div", value, class_="value"),
        tag("div", note, class_="note"),
        class_="tile",
    )


def _data_section(report: Report) -> Markup:
    software = table(
        ["package", "version"],
        [(name, version) for name, version in sorted(report.software.items())],
        class_="plain",
    )
    unjudged = tag("p", "This job had no validation.")
    validation = unjudged if report.validation is None else _tokens(report.validation)
    return section(
        "Data and software",
        tag(
            "div",
            tag("div", tag("h3", "Calibration"), _tokens(report.calibration), tag("h3", "Validation"), validation),
            tag(
                "div",
                tag("h3", "Source model"),
                facts([("uri", code(report.model.uri)), ("digest", code(report.model.digest))]),
                tag("h3", "Software"),
                software,
            ),
            class_="pair",
        ),
    )


def _tokens(tokens: TokensReport) -> Markup:
    source = [(str(name), code(_value(value))) for name, value in sorted(tokens.source.items()) if value is not None]
    total = tokens.sequences * tokens.sequence_length
    windows = f"{count(tokens.sequences, 'window')} of {count(tokens.sequence_length, 'token')}: {total:,} in all"
    if tokens.drawn:
        windows += f"; {count(tokens.drawn, 'further window')} drawn for experts that saw too few"
    if tokens.held_out:
        windows += f"; {count(tokens.held_out, 'further window')} held out"
    return facts([*source, ("windows", windows), ("digest", code(tokens.digest))])


def _value(value: object) -> str:
    return value if isinstance(value, str) else _yaml(value).removesuffix("\n...").strip()


def _details(report: Report) -> Markup:
    recipe = report.model_dump(mode="json", include={"recipe"})["recipe"]
    return section(
        "In full",
        fold("Recipe and calibration (YAML)", tag("pre", _yaml(recipe))),
        fold(f"All modules ({len(report.modules):,})", _module_table(report.modules)),
        *_ordered(report.modules),
        fold(f"All tasks ({len(report.tasks):,})", cost.task_table(report.tasks)),
    )


def _ordered(modules: tuple[ModuleReport, ...]) -> list[Markup]:
    """The first of all modules by what people look for: a page without scripts cannot be sorted."""
    orders: dict[str, Callable[[ModuleReport], float]] = {
        "Largest error": lambda module: module.error_after or 0.0,
        "Longest solve": lambda module: module.seconds,
        "Fewest tokens": lambda module: -module.tokens,
    }
    if len(modules) <= FIRST:
        return [
            fold(f"Modules by: {name.lower()}", _module_table(tuple(sorted(modules, key=by, reverse=True))))
            for name, by in orders.items()
        ]
    return [
        fold(f"{name}: the first {FIRST} modules", _module_table(tuple(sorted(modules, key=by, reverse=True)[:FIRST])))
        for name, by in orders.items()
    ]


def _yaml(value: object) -> str:
    # Sorted, because mappings that differ only in order are equal reports.
    text: str = yaml.safe_dump(value, sort_keys=True, allow_unicode=True, width=100)
    return text.strip()


def _module_table(modules: tuple[ModuleReport, ...]) -> Markup:
    head = [
        "module",
        "out × in",
        "bits",
        "group",
        "rank",
        "tokens",
        "bits per weight",
        "error before",
        "after",
        "measured on",
        "seconds",
    ]
    rows = [
        (
            code(m.name),
            f"{m.rows} × {m.columns}",
            str(m.bits),
            NONE if m.group_size is None else str(m.group_size),
            str(m.rank),
            str(m.tokens),
            f"{(m.code_bits + m.scale_bits + m.factor_bits + m.residual_bits) / max(m.rows * m.columns, 1):.4f}",
            _error(m.error_before),
            _error(m.error_after),
            measured_on(m),
            f"{m.seconds:.2f}",
        )
        for m in modules
    ]
    return table(head, rows)


def _error(value: float | None) -> str:
    return NONE if value is None else f"{value:.4e}"
