"""What the compression cost in quality, on text and per module."""

from __future__ import annotations

from counterweight.pipeline.artifact.report import Quality, Report, labelled
from counterweight.pipeline.artifact.report_html.markup import Markup, tag
from counterweight.pipeline.artifact.report_html.modules import Panel, middle, panels
from counterweight.pipeline.artifact.report_html.plots import ErrorPlots, perplexity_plot
from counterweight.pipeline.artifact.report_html.tables import figure, legend, section, table
from counterweight.pipeline.artifact.report_html.text import NONE, count, exact, percent
from counterweight.workers.metrics import METRICS, Metric

ERROR = "‖(W − W′)X‖² / ‖WX‖² over the calibration tokens"


MARKS = ("original", "before", "after", "prefill")
"""Class of each variant's mark, in the order of `labelled`."""


def has_branches(report: Report) -> bool:
    """Whether any module has a low-rank branch, which errors per module know of."""
    return any(module.rank > 0 for module in report.modules)


def has_stores(report: Report) -> bool:
    """Whether any module has a residual store, which errors per module do not know of."""
    return any(module.residual_bits > 0 for module in report.modules)


def has_compensation(report: Report) -> bool:
    """Whether any module has a low-rank branch or a residual store."""
    return has_branches(report) or has_stores(report)


def gap_closed(report: Report, compensated: Quality | None) -> float | None:
    """Share of the perplexity that quantization cost and the `compensated` model of the report won back; None without
    validation, compensation or cost. Negative when compensation made it worse."""
    if report.baseline is None or report.quantized is None or compensated is None:
        return None
    gap = report.quantized.perplexity - report.baseline.perplexity
    if gap <= 0 or not has_compensation(report):
        return None
    return (report.quantized.perplexity - compensated.perplexity) / gap


def result_section(report: Report) -> Markup:
    """The original, the quantized and the compensated model (with residual stores: decoding, and in prefill) on the validation
    text."""
    baseline = report.baseline
    if baseline is None:
        text = "This job had no validation: nothing was measured on text. All that is known are the errors per module."
        return section("Result", tag("p", text, class_="warning"))
    shown = labelled(report.qualities)
    columns = [(label, class_, quality) for (label, quality), class_ in zip(shown.items(), MARKS, strict=False)]
    if not has_compensation(report):
        columns = columns[:2]
    rows: list[tuple[str, ...]] = []
    for metric in METRICS:
        values = [quality.of(metric) for _, _, quality in columns]
        if any(value is not None for value in values):
            rows.append((metric.label, *(_shown(metric, value) for value in values)))
        if metric.relative:
            rows.append(("ratio to the original", *(_ratio(metric, quality, baseline) for _, _, quality in columns)))
    return section(
        "Result",
        tag("p", _verdict(report)),
        tag(
            "div",
            table(["", *(label for label, _, _ in columns)], rows),
            figure(
                "Perplexity, lower is better",
                perplexity_plot([(label, class_, q.perplexity) for label, class_, q in columns]),
            ),
            class_="pair",
        ),
        *_routers(report),
        tag("p", _measured(report), class_="soft"),
    )


def _routers(report: Report) -> list[Markup]:
    """How often routers choose as the original's do, block by block."""
    shown = list(labelled(report.routers).items())[1:]  # the original agrees with itself
    shown = shown if has_compensation(report) else shown[:1]
    if not shown:
        return []
    rows = [(f"block {block}", *(_share(found[block]) for _, found in shown)) for block in shown[0][1]]
    about = "Share of tokens whose router chooses the same experts as the original's, which sees the original's activations."
    return [tag("h3", "Routers"), tag("p", about), table(["", *(label for label, _ in shown)], rows)]


def _shown(metric: Metric, value: float | None) -> str:
    if metric.higher_is_better:
        return NONE if value is None else _share(value)
    return exact(value, metric.digits if metric.relative else ".4g")


def _ratio(metric: Metric, quality: Quality, baseline: Quality) -> str:
    value, original = quality.of(metric), baseline.of(metric)
    return exact(value / original if value is not None and original is not None and original > 0 else None, ".4f")


def _share(value: float) -> Markup:
    return tag("data", percent(value), value=repr(value), title=repr(value))


def _verdict(report: Report) -> str:
    if not has_compensation(report):
        return "No module has a low-rank branch or a residual store: the quantized model is what is served."
    closed = gap_closed(report, report.compensated)
    if closed is None:
        return "Quantization alone did not raise the perplexity, so there was no gap for compensation to close."
    in_prefill = gap_closed(report, report.compensated_prefill)
    prefill = "" if in_prefill is None else f" In prefill: {percent(in_prefill)}."
    if closed < 0:
        return (
            f"Compensation made it worse: it widened the perplexity gap that quantization left by {percent(-closed)}."
            f"{prefill}"
        )
    return (
        f"Compensation closed {percent(closed)} of the perplexity gap between the quantized and the original model."
        f"{prefill}"
    )


def _measured(report: Report) -> str:
    windows = "the validation windows"
    if report.validation is not None:
        windows = (
            f"{count(report.validation.sequences, 'window')} of {count(report.validation.sequence_length, 'token')}"
        )
    text = (
        f"Measured side by side on {windows}, in {report.validation_dtype}. The quantized column was measured without "
        "compensation, not estimated. KL and agreement compare next-token distributions with the original's."
    )
    if report.compensated_prefill is None:
        return text
    return (
        f"{text} Decoding: residual stores correct every token, as when tokens come one at a time; gates look at it. "
        "Prefill: a text that is given whole, which residual stores leave alone."
    )


def error_section(report: Report) -> Markup:
    """Output error of every module, before and after compensation."""
    found = tuple(panels(report.modules))
    unmeasured = sum(panel.unmeasured for panel in found)
    title = "Error per module"
    if not found:
        return section(title, tag("p", "No module was quantized."))
    if not any(panel.spreads for panel in found):
        return section(
            title, tag("p", "No error was measured: no calibration token reached any module.", class_="warning")
        )
    compensated = has_branches(report)
    notes = [f"Relative output error {ERROR}; lower is better. {_tokens_of_errors(report)}"]
    notes.append("All plots share one logarithmic axis.")
    if any(panel.several for panel in found):
        notes.append(
            "Where a block has several modules of a kind (experts), a bar runs from the smallest to the largest error "
            "and its tick is the median."
        )
    if unmeasured:
        notes.append(f"{count(unmeasured, 'module has', 'modules have')} no error, because no token reached them.")
    if has_stores(report):
        notes.append("What residual stores correct while decoding is not taken off.")
    if any(value <= 0 for panel in found for value in (*panel.before, *panel.after)):
        notes.append("Errors of exactly zero stand at the lower edge.")
    return section(
        title,
        tag(
            "figure",
            _error_legend(found, compensated),
            ErrorPlots(found, compensated).draw(),
            tag("figcaption", " ".join(notes)),
        ),
        tag("h3", "By kind"),
        _kinds(found, compensated),
    )


def _tokens_of_errors(report: Report) -> str:
    """What errors are measured on: those of the tokens that a layer was solved on are too good to be true."""
    inside = sum(module.held_out is None for module in report.modules)
    if inside == len(report.modules):
        return "In-sample: measured on the tokens that layers were solved on, so that others have larger ones."
    text = f"Measured on {count(report.calibration.held_out, 'window')} that nothing was solved on."
    layers = sum(module.held_out is not None and module.held_out.of_layer for module in report.modules)
    if layers:
        text += f" Of experts that see hardly any of their tokens on those of their layer: {count(layers, 'module')}."
    return text + (f" In-sample, of {count(inside, 'module')}: no such token reached them." if inside else "")


def _error_legend(found: tuple[Panel, ...], compensated: bool) -> Markup:
    entries: list[tuple[str, str]] = []
    shapes: list[str] = []
    for shape in ("dot", "bar"):
        if not any(panel.several == (shape == "bar") for panel in found if panel.spreads):
            continue
        suffix = ", range" if shape == "bar" else ""
        entries.append(("before", f"quantized{suffix}"))
        shapes.append("ring" if compensated and shape == "dot" else shape)
        if compensated:
            entries.append(("after", f"compensated{suffix}"))
            shapes.append(shape)
    return legend(entries, shapes=shapes)


def _kinds(found: tuple[Panel, ...], compensated: bool) -> Markup:
    head = ["kind", "modules", "median error"]
    head += ["compensated", "ratio", "largest"] if compensated else ["largest"]
    rows: list[list[str]] = []
    for panel in found:
        before, after = middle(panel.before), middle(panel.after)
        row: list[str] = [panel.kind, f"{len(panel.before) + panel.unmeasured:,}", exact(before, ".3e")]
        if compensated:
            row += [exact(after, ".3e"), f"{after / before:.3f}" if before and after is not None else NONE]
        rows.append([*row, _largest(panel)])
    return table(head, rows)


def _largest(panel: Panel) -> str:
    if not panel.spreads:
        return NONE
    value, block = max((max(spread.after), spread.block) for spread in panel.spreads)
    return f"{value:.3e} in block {block}"
