"""The figures of the report's page: tables that are exact, and plots that show what the numbers say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from math import log10
from statistics import median

import pytest

from counterweight.pipeline.artifact.report import Report
from counterweight.workers.tasks.records import FallbackReport
from tests.pipeline.report_documents import (
    BASELINE,
    BITS,
    PREFILL,
    QUANTIZED,
    Node,
    dense,
    marks,
    mixtral,
    module,
    page,
    report,
    task,
)


def assert_affine(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line that all (value, position) lie on, to within the rounding of positions."""
    (low, at_low), (high, at_high) = min(points), max(points)
    slope = (at_high - at_low) / (high - low)
    for value, position in points:
        assert position == pytest.approx(at_low + slope * (value - low), abs=0.02)
    return slope


def axis(plot: Node) -> list[tuple[float, float]]:
    """Value and height of every label of a plot's rising axis."""
    powers = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    found: list[tuple[float, float]] = []
    for line, label in zip(plot.all("line", "grid"), plot.all("text"), strict=False):
        assert label.attributes["text-anchor"] == "end"
        base, _, power = label.text.replace(",", "").partition("10⁻")
        value = 10.0 ** -int(power.translate(powers)) if power else float(base)
        found.append((value, line.number("y1")))
    assert len(found) > 1
    return found


class TestResult:
    def exact(self, node: Node) -> set[str]:
        return {data.attributes["value"] for data in node.all("data")}

    def test_holds_the_exact_figures_of_all_three_models(self) -> None:
        made = report()
        assert made.compensated is not None
        section = page(made).section("Result")
        assert section.rows() == [
            ["perplexity", "12.3102", "14.8012", "13.2712"],
            ["ratio to the original", "1.0000", "1.2024", "1.0781"],
            ["KL, nats per token", "0", "0.1812", "0.07123"],
            ["top-1 agreement", "100.0 %", "78.1 %", "86.2 %"],
        ]
        for quality in (BASELINE, QUANTIZED, made.compensated):
            exact = {repr(quality.perplexity), repr(quality.kl), repr(quality.top1_agreement)}
            assert exact <= self.exact(section)
        assert "Compensation closed 61.4 % of the perplexity gap" in section.text

    @pytest.mark.parametrize(
        ("perplexity", "text"),
        [
            (15.3, "Compensation made it worse: it widened the perplexity gap that quantization left by 20.0 %"),
            (12.0, "112.5 %"),
        ],
    )
    def test_a_gap_that_widened_or_was_overfilled_is_said(self, perplexity: float, text: str) -> None:
        quality = QUANTIZED.model_copy(update={"perplexity": perplexity})
        assert text in page(report(compensated=quality)).section("Result").text

    def test_without_a_gap_no_share_is_claimed(self) -> None:
        made = report().model_copy(update={"quantized": BASELINE})
        section = page(made).section("Result")
        assert "there was no gap" in section.text
        assert "closed" not in section.text

    def test_without_validation_it_says_so_and_shows_no_figure(self) -> None:
        root = page(report(validated=False))
        section = root.section("Result")
        assert "had no validation" in section.text
        assert not section.all("table")
        assert "not validated" in root.all("header")[0].text
        assert "This job had no validation." in root.section("Data and software").text

    def test_without_compensation_there_is_no_third_column(self) -> None:
        section = page(report(dense(2, rank=0), compensated=QUANTIZED)).section("Result")
        assert section.rows()[0] == ["perplexity", "12.3102", "14.8012"]
        assert "the quantized model is what is served" in section.text

    def test_with_residual_stores_decoding_and_prefill_are_told_apart(self) -> None:
        root = page(report(prefill=PREFILL))
        section = root.section("Result")
        assert [head.text for head in section.all("th")][1:5] == [
            *("original", "quantized", "compensated, decoding", "compensated, prefill")
        ]
        assert section.rows()[0] == ["perplexity", "12.3102", "14.8012", "13.2712", "14.3022"]
        assert len(section.all("circle", "point")) == 4
        assert "closed 61.4 % of the perplexity gap" in section.text
        assert "In prefill: 20.0 %." in section.text
        assert "residual stores correct every token" in section.text
        assert "perplexity, decoding" in root.all("header")[0].text
        for word in ("decoding", "refill"):
            assert word not in page(report()).section("Result").text

    def test_a_store_without_branches_is_compensation_that_no_error_shows(self) -> None:
        modules = [module(f"model.layers.0.{name}", 0.02, 0.02, rank=0, residual_bits=64 * 128 * 4) for name in "ab"]
        root = page(report(modules, prefill=QUANTIZED))
        assert root.section("Result").rows()[0] == ["perplexity", "12.3102", "14.8012", "13.2712", "14.8012"]
        assert "In prefill: 0.0 %." in root.section("Result").text
        errors = root.section("Error per module")
        assert "What residual stores correct while decoding is not taken off." in errors.text
        assert not errors.all("circle", "after")

    def test_perplexities_are_drawn_to_scale(self) -> None:
        made = report()
        assert made.compensated is not None
        points = page(made).section("Result").all("circle", "point")
        values = [BASELINE.perplexity, QUANTIZED.perplexity, made.compensated.perplexity]
        assert assert_affine([(v, p.number("cx")) for v, p in zip(values, points, strict=True)]) > 0


class TestBits:
    def test_the_table_holds_every_part_and_the_sums(self) -> None:
        section = page(report()).section("Bits per weight")
        values = [float(data.attributes["value"]) for data in section.all("data")]
        assert values == [BITS.weights, BITS.scales, BITS.factors, BITS.residual, BITS.total, BITS.model]

    def test_the_bar_is_cut_in_proportion(self) -> None:
        segments = page(report()).section("Bits per weight").all("rect", "segment")
        parts = [BITS.weights, BITS.scales, BITS.factors, BITS.residual]
        widths = [segment.number("width") for segment in segments]
        assert [width / sum(widths) for width in widths] == pytest.approx([p / sum(parts) for p in parts], abs=1e-4)
        for left, right in pairwise(segments):
            assert left.number("x") + left.number("width") == pytest.approx(right.number("x"), abs=0.02)

    def test_a_part_that_costs_nothing_is_not_drawn(self) -> None:
        made = report().model_copy(update={"bits_per_weight": BITS.model_copy(update={"residual": 0.0})})
        assert len(page(made).section("Bits per weight").all("rect", "segment")) == 3


class TestErrors:
    def panels(self, made: Report) -> dict[str, Node]:
        plots = page(made).section("Error per module").all("div", "panels")[0].all("svg", "plot")
        return {plot.all("text", "strong")[0].text: plot for plot in plots}

    def test_one_plot_per_kind_in_the_order_of_a_block(self) -> None:
        kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        modules = dense(3)
        random.Random(0).shuffle(modules)
        assert list(self.panels(report(modules))) == kinds
        experts = ["experts: gate (w1)", "experts: up (w3)", "experts: down (w2)"]
        assert list(self.panels(report(mixtral()))) == kinds[:4] + experts

    @pytest.mark.parametrize("blocks", [1, 6, 100])
    def test_every_module_stands_at_its_error_and_block(self, blocks: int) -> None:
        draw = random.Random(1)
        modules = dense(blocks, lambda _: 10 ** draw.uniform(-4, -1))
        found = self.panels(report(modules)).values()
        heights: list[tuple[float, float]] = []
        places: list[tuple[float, float]] = []
        for plot in found:
            before, after = marks(plot, "before"), marks(plot, "after")
            assert len(before) == len(after) == blocks
            for made in modules:
                if made.name in before:
                    assert made.error_quantized is not None
                    assert made.error_compensated is not None
                    heights.append((log10(made.error_quantized), before[made.name].number("cy")))
                    heights.append((log10(made.error_compensated), after[made.name].number("cy")))
                    places.append((float(made.name.split(".")[2]), before[made.name].number("cx")))
        assert len(heights) == 2 * len(modules)
        heights += [(log10(value), y) for plot in found for value, y in axis(plot.all("g")[0])]
        assert assert_affine(heights) < 0  # a larger error stands higher, on one axis for all plots
        if blocks > 1:
            assert assert_affine(places) > 0

    def test_changing_one_error_moves_one_mark(self) -> None:
        modules = dense(6)
        changed = list(modules)
        changed[17] = changed[17].model_copy(update={"error_compensated": 0.02})
        before, after = (page(report(m)).section("Error per module") for m in (modules, changed))
        old, new = marks(before, "after"), marks(after, "after")
        moved = [name for name in old if old[name].attributes != new[name].attributes]
        assert moved == [modules[17].name]
        assert new[modules[17].name].number("cy") < old[modules[17].name].number("cy")
        assert marks(before, "before") == marks(after, "before")

    def test_experts_are_drawn_as_ranges_with_their_medians(self) -> None:
        draw = random.Random(2)
        modules = [
            m.model_copy(
                update={"error_quantized": 10 ** draw.uniform(-3, 0), "error_compensated": 10 ** draw.uniform(-4, -1)}
            )
            for m in mixtral()
        ]
        found = self.panels(report(modules))
        plot = found["experts: down (w2)"]
        heights: list[tuple[float, float]] = []
        for field, class_ in (("error_quantized", "before"), ("error_compensated", "after")):
            ranges, ticks = plot.all("rect", class_, "range"), plot.all("rect", class_, "median")
            assert len(ranges) == len(ticks) == 6
            for block in range(6):
                errors = [
                    getattr(m, field)
                    for m in modules
                    if m.name.startswith(f"model.layers.{block}.") and m.name.endswith("w2")
                ]
                assert len(errors) == 8
                top = ranges[block].number("y")
                heights.append((log10(max(errors)), top))
                heights.append((log10(min(errors)), top + ranges[block].number("height")))
                middle = ticks[block].number("y") + ticks[block].number("height") / 2
                heights.append((log10(median(errors)), middle))
        for made in modules:
            if made.name.endswith("q_proj"):
                assert made.error_quantized is not None
                heights.append((log10(made.error_quantized), marks(found["q_proj"], "before")[made.name].number("cy")))
        assert assert_affine(heights) < 0
        assert "a bar runs from the smallest to the largest error" in page(report(modules)).text

    def test_without_compensation_there_is_one_mark_per_module(self) -> None:
        section = page(report(dense(2, rank=0), compensated=QUANTIZED)).section("Error per module")
        assert len(section.all("circle", "before")) == 14 + 1  # and one in the legend
        assert not section.all("circle", "after")
        assert "compensated" not in section.text

    def test_modules_without_an_error_are_counted_not_drawn(self) -> None:
        modules = [*dense(2), module("model.layers.1.mlp.extra", None, None, tokens=0)]
        section = page(report(modules)).section("Error per module")
        assert "1 module has no error, because no token reached them" in section.text
        assert len(section.all("circle", "before")) == 14 + 1
        assert ["extra", "1", "–", "–", "–", "–"] in section.rows()

    def test_nothing_measured_is_said(self) -> None:
        modules = [module("model.layers.0.mlp.up_proj", None, None, tokens=0)]
        assert "No error was measured" in page(report(modules)).section("Error per module").text

    def test_an_error_of_zero_stands_at_the_lower_edge(self) -> None:
        modules = [module("model.layers.0.mlp.up_proj", 0.1, 0.0), module("model.layers.1.mlp.up_proj", 0.01, 0.001)]
        section = page(report(modules)).section("Error per module")
        after = marks(section, "after")
        assert after[modules[0].name].number("cy") >= after[modules[1].name].number("cy")
        assert "exactly zero stand at the lower edge" in section.text

    def test_the_table_gives_medians_and_the_worst_block(self) -> None:
        errors = [0.01, 0.02, 0.06]
        modules = [module(f"model.layers.{b}.mlp.up_proj", e, e / 4) for b, e in enumerate(errors)]
        rows = page(report(modules)).section("Error per module").rows()
        assert rows == [["up_proj", "3", "2.000e-02", "5.000e-03", "0.250", "1.500e-02 in block 2"]]


class TestCoverage:
    def test_a_dense_model_says_how_many_tokens(self) -> None:
        text = page(report()).section("Calibration coverage").text
        assert "Every module saw 4,096 tokens." in text
        assert "No module saw fewer tokens than it has input columns." in text

    def test_every_expert_has_a_cell_of_the_right_shade(self) -> None:
        modules = mixtral(6, 8)
        figure = page(report(modules)).figure("Tokens by expert")
        # 100 to 800 tokens, 450 on average: one below a quarter, two at and above 0.5, ...
        cells = {p.classes[0]: p.attributes["d"].count("z") for p in figure.all("svg", "plot")[0].all("path")}
        assert cells == {"heat0": 6, "heat1": 6, "heat2": 12, "heat3": 24}
        assert figure.text.count("800") == 6

    def test_hundreds_of_experts_get_cells_too_and_those_without_a_token_stand_out(self) -> None:
        modules = [
            module(f"model.layers.{block}.mlp.experts.{expert}.up_proj", tokens=0 if expert == 7 else 1000)
            for block in range(4)
            for expert in range(256)
        ]
        figure = page(report(modules)).figure("Tokens by expert")
        cells = {p.classes[0]: p.attributes["d"].count("z") for p in figure.all("svg", "plot")[0].all("path")}
        assert cells == {"none": 4, "heat3": 4 * 255}

    def test_too_few_tokens_are_listed_fewest_first(self) -> None:
        modules = mixtral(1, 8)
        modules[4:7] = [m.model_copy(update={"tokens": 0}) for m in modules[4:7]]
        section = page(report(modules)).section("Calibration coverage")
        moe = "model.layers.0.block_sparse_moe.experts"
        assert section.rows() == [
            [f"{moe}.0", "w1, w3, w2", "0", "128, 352", "these alone"],
            [f"{moe}.1", "w2", "200", "352", "these alone"],
            [f"{moe}.2", "w2", "300", "352", "these alone"],
        ]
        assert "5 modules saw too few tokens, 3 of them none. The statistics of 5 are singular" in section.text

    def test_experts_that_were_fed_are_told_apart(self) -> None:
        lack = [FallbackReport(step="experts.starved", cause="200 of 256 tokens")]
        modules = [module("layers.0.mlp.experts.0.up_proj", tokens=200, fallbacks=lack), module("layers.0.mlp.up_proj")]
        section = page(report(modules)).section("Calibration coverage")
        assert section.rows() == [["layers.0.mlp.experts.0", "up_proj", "200", "128", "the layer's too"]]
        assert "1 module saw too few tokens, 0 of them none. 1 were solved on tokens of their layer" in section.text
        assert "singular" not in section.text

    def test_a_long_list_is_folded_but_whole(self) -> None:
        modules = [module(f"model.layers.{i}.mlp.up_proj", tokens=i) for i in range(50)]
        section = page(report(modules)).section("Calibration coverage")
        assert len(section.rows()) == 50
        assert section.all("details")[0].all("summary")[0].text == "30 more"


class TestTasks:
    TASKS = (
        task("block 0", load=1.0, forward=2.0, solve=4.0, write=0.5, host=700 << 20),
        task("block 1", load=0.5, forward=1.0, solve=8.0, write=1.5, host=900 << 20, reused=True),
        task("validation of windows 0 to 15", forward=3.0, host=800 << 20),
    )

    def test_columns_are_stacked_to_scale(self) -> None:
        plot = page(report(tasks=self.TASKS)).figure("Time per task").all("svg", "plot")[0]
        columns = [g for g in plot.all("g") if g.all("title")]
        heights: list[tuple[float, float]] = [(0.0, 0.0)]
        for made, column in zip(self.TASKS, columns, strict=True):
            bars = column.all("rect")
            values = [getattr(made.timing, bar.classes[0]) for bar in bars]
            assert sum(values) == pytest.approx(made.timing.total)
            heights += [(value, bar.number("height")) for value, bar in zip(values, bars, strict=True)]
            for lower, upper in pairwise(bars):
                assert upper.number("y") + upper.number("height") == pytest.approx(lower.number("y"), abs=0.02)
        slope = assert_affine(heights)
        assert slope > 0
        assert assert_affine(axis(plot.all("g")[0])) == pytest.approx(-slope, rel=0.01)
        assert "seconds" in plot.text
        assert "validation" in plot.text

    def test_memory_is_drawn_to_scale_in_binary_units(self) -> None:
        plot = page(report(tasks=self.TASKS)).figure("Peak memory per task").all("svg", "plot")[0]
        bars = plot.all("rect", "host")
        sizes = [float(made.timing.host_peak_bytes) for made in self.TASKS]
        slope = assert_affine([(0.0, 0.0), *zip(sizes, [b.number("height") for b in bars], strict=True)])
        assert assert_affine(axis(plot.all("g")[0])) == pytest.approx(-slope * 2**20, rel=0.01)
        assert "MiB" in plot.text
        assert not plot.all("rect", "device")

    def test_a_gpus_memory_stands_beside_the_hosts(self) -> None:
        tasks = [task("block 0", solve=1.0, host=1 << 30, device=4 << 30)]
        figure = page(report(tasks=tasks)).figure("Peak memory per task")
        host, device = (figure.all("svg", "plot")[0].all("rect", kind)[0] for kind in ("host", "device"))
        assert device.number("height") == pytest.approx(4 * host.number("height"), abs=0.05)
        assert device.number("x") >= host.number("x") + host.number("width") - 0.02

    def test_reused_tasks_are_told_apart(self) -> None:
        root = page(report(tasks=self.TASKS))
        reused = root.figure("Time per task").all("g", "reused")
        assert [g.all("title")[0].text.split(":")[0] for g in reused] == ["block 1"]
        text = root.section("Time and memory").text
        assert "2 tasks took 10.5 s in sum. 1 task was found finished and reused" in text
        assert "Largest peak on a host: 900 MiB (block 1)" in text

    def test_the_unit_of_time_follows_the_longest_task(self) -> None:
        figure = page(report(tasks=[task("block 0", solve=7200.0)])).figure("Time per task")
        assert "hours" in figure.text

    def test_stages_stand_in_the_order_of_a_job(self) -> None:
        rows = page(report()).section("Time and memory").rows()
        assert rows == [["tokens", "1.50", "9.8 %"], ["blocks", "13.75", "90.2 %"], ["total", "15.25", ""]]

    def test_all_tasks_are_tabled(self) -> None:
        folds = page(report(tasks=self.TASKS)).section("In full").all("details")
        (fold,) = [fold for fold in folds if fold.all("summary")[0].text == "All tasks (3)"]
        assert fold.rows()[1] == [
            "block 1", "0.500", "1.000", "8.000", "1.500", "11.000", "900 MiB", "–", "cpu", "yes",
        ]  # fmt: skip
