"""The report's page: complete, exact, safe, and with plots that show what the figures say."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log10
from statistics import median
from typing import Any

import pytest

from pipeline.report import Report
from pipeline.report_html import render
from tests.pipeline.report_documents import (
    BASELINE,
    BITS,
    QUANTIZED,
    Node,
    dense,
    marks,
    mixtral,
    module,
    read,
    report,
    task,
)
from workers.block import FallbackReport

PAYLOAD = "\"'><img src=x onerror=alert(1)></title></style></svg><script>alert(2)</script>&amp;"

CASES: dict[str, Callable[[], Report]] = {
    "validated": report,
    "not validated": lambda: report(validated=False),
    "no compensation": lambda: report(dense(2, rank=0), compensated=QUANTIZED),
    "errors unknown": lambda: report([module("model.layers.0.mlp.up_proj", None, None, tokens=0)]),
    "errors zero": lambda: report([module("model.layers.0.mlp.up_proj", 0.0, 0.0)]),
    "one module": lambda: report([module("model.layers.0.mlp.up_proj")], [task("block 0", solve=1.0)]),
    "no module, no task": lambda: report([], []),
    "100 blocks": lambda: report(dense(100), [task(f"block {i}", solve=1 + i % 7) for i in range(100)]),
    "mixtral": lambda: report(mixtral()),
    "128 experts": lambda: report(mixtral(3, 128)),
    "unknown names": lambda: report([module("a"), module("b."), module("layers.x.c"), module("model.layers.7.new")]),
}


def page(made: Report) -> Node:
    return read(render(made))


def assert_affine(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line that all (value, position) lie on, to within the rounding of positions."""
    (low, at_low), (high, at_high) = min(points), max(points)
    slope = (at_high - at_low) / (high - low)
    for value, position in points:
        assert position == pytest.approx(at_low + slope * (value - low), abs=0.02)
    return slope


class TestPage:
    @pytest.mark.parametrize("case", CASES)
    def test_is_balanced_and_needs_nothing_beside_itself(self, case: str) -> None:
        root = page(CASES[case]())
        tags = {node.tag for node in root.walk()}
        assert not tags & {"script", "img", "iframe", "object", "embed", "image", "use", "a", "form", "base"}
        for node in root.walk():
            assert not {"src", "srcset", "data", "xlink:href", "action"} & node.attributes.keys()
            assert not [name for name in node.attributes if name.startswith("on")]
            assert node.attributes.get("href", "data:,") == "data:,"
        (style,) = root.all("style")
        assert not re.search(r"https?:|url\(|@import", style.text)
        assert "http" not in render(CASES[case]()).replace("http-equiv", "")

    @pytest.mark.parametrize("case", CASES)
    def test_every_plot_says_what_it_shows(self, case: str) -> None:
        plots = page(CASES[case]()).all("svg", "plot")
        assert plots
        assert all(plot.attributes["role"] == "img" and plot.attributes["aria-label"] for plot in plots)

    @pytest.mark.parametrize("case", CASES)
    def test_no_figure_is_undefined(self, case: str) -> None:
        body = page(CASES[case]()).all("body")[0]
        everything = body.text + " ".join(value for node in body.walk() for value in node.attributes.values())
        assert not re.search(r"\b(nan|inf|None|True|False)\b", everything)

    def test_forbids_scripts_and_requests_and_follows_the_readers_colours(self) -> None:
        root = page(report())
        policy = next(m for m in root.all("meta") if "http-equiv" in m.attributes).attributes["content"]
        assert policy.startswith("default-src 'none'")
        assert "script" not in policy
        style = root.all("style")[0].text
        assert "prefers-color-scheme: dark" in style
        assert "@media print" in style
        assert style.count("{") == style.count("}")

    def test_every_class_that_colours_a_mark_is_in_the_style_sheet(self) -> None:
        tasks = [task("block 0", load=1, forward=1, solve=1, write=1, device=1 << 30), task("validation of", forward=1)]
        for made in (report(mixtral(), tasks), report(dense(2), tasks)):
            root = page(made)
            style = root.all("style")[0].text
            shapes = [n for s in root.all("svg") for n in s.walk() if n.tag in ("rect", "circle", "path", "line")]
            assert {c for shape in shapes for c in shape.classes if f".{c}" not in style} <= {"square"}

    def test_equal_reports_give_equal_pages(self) -> None:
        def backwards(value: Any) -> Any:
            return {k: backwards(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

        made = report(mixtral())
        other = Report.model_validate(backwards(made.model_dump()))
        assert list(other.software) != list(made.software)
        assert other == made
        assert render(made) == render(other) == render(Report.model_validate_json(made.model_dump_json()))

    def test_a_page_of_a_large_model_stays_small_enough_to_open(self) -> None:
        assert len(render(report(dense(100)))) < 1 << 20


class TestEscaping:
    def test_no_string_of_the_report_becomes_markup(self) -> None:
        fallback = FallbackReport(step=PAYLOAD, cause=PAYLOAD)
        modules = [
            module(f"model.layers.0.{PAYLOAD}", fallbacks=[fallback]),
            module(f"model.layers.0.x.experts.1.{PAYLOAD}", tokens=0),
        ]
        tasks = [task(PAYLOAD, solve=1.0), task("block 0", solve=1.0), task(f"{PAYLOAD}{PAYLOAD} x", solve=1.0)]
        benign = report(modules, tasks)
        hostile = Report.model_validate(_poisoned(benign.model_dump()))
        root = page(hostile)
        assert {n.tag for n in root.walk()} <= {n.tag for n in page(report(mixtral())).walk()} | {"h3", "figure"}
        assert not [name for node in root.walk() for name in node.attributes if name.startswith("on")]
        assert "<script" not in render(hostile)
        # Names, ids, URIs, digests, steps, causes, software, stages: shown as they are.
        assert root.all("body")[0].text.count(PAYLOAD) > 15
        assert root.all("title")[0].text.startswith(PAYLOAD)

    def test_what_cannot_be_shown_is_replaced(self) -> None:
        made = report([module("model.layers.0.a\x00b\x1b[31m\u202ec")])
        text = render(made)
        assert not re.search("[\x00\x1b\u202e]", text)
        assert "a\ufffdb\ufffd[31m\ufffdc" in text

    def test_the_page_is_utf_8(self) -> None:
        made = report([module("model.layers.0.größe_μ")])
        assert "größe_μ" in render(made).encode().decode()


def _poisoned(value: Any) -> Any:
    """Every string of a dumped report, keys of free mappings included, with the payload behind it."""
    if isinstance(value, dict):
        free = not {"kind", "name", "uri", "load", "weights", "step", "schema_version", "perplexity"} & value.keys()
        return {f"{k}{PAYLOAD}" if free and "recipe" not in value else k: _poisoned(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_poisoned(item) for item in value)
    return value + PAYLOAD if isinstance(value, str) and PAYLOAD not in value else value


class TestHeadline:
    def test_says_what_was_made_of_what(self) -> None:
        header = page(report()).all("header")[0].text
        for text in ("demo", "3f9a1c07be52d481", "file:///models/demo", "llama", "1,412,352 parameters"):
            assert text in header
        assert "W3 per channel, GPTQ + low rank 16 (svd, full whitening)" in header

    def test_its_figures_are_the_reports(self) -> None:
        values = [node.text for node in page(report()).all("div", "value")]
        assert values == ["13.271", "0.0712", "61.4 %", "3.438"]


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
        assert assert_affine(heights) < 0  # a larger error stands higher, on one axis for all plots
        if blocks > 1:
            assert assert_affine(places) > 0

    def test_changing_one_error_moves_one_mark(self) -> None:
        modules = dense(6)
        changed = list(modules)
        changed[17] = changed[17].model_copy(update={"error_compensated": 0.011})
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
            [f"{moe}.0", "w1, w3, w2", "0", "128, 352"],
            [f"{moe}.1", "w2", "200", "352"],
            [f"{moe}.2", "w2", "300", "352"],
        ]
        assert "5 modules saw fewer tokens than input columns, 3 of them none" in section.text

    def test_a_long_list_is_folded_but_whole(self) -> None:
        modules = [module(f"model.layers.{i}.mlp.up_proj", tokens=i) for i in range(50)]
        section = page(report(modules)).section("Calibration coverage")
        assert len(section.rows()) == 50
        assert section.all("details")[0].all("summary")[0].text == "30 more"


class TestFallbacks:
    def test_none_is_said(self) -> None:
        assert "None: every module" in page(report()).section("Fall-backs").text

    def test_each_stands_with_its_cause(self) -> None:
        modules = dense(2)
        causes = [
            FallbackReport(step="gptq.damping", cause="raised to 0.1"),
            FallbackReport(step="svd.rank", cause="cut"),
        ]
        modules[3] = modules[3].model_copy(update={"fallbacks": tuple(causes)})
        section = page(report(modules)).section("Fall-backs")
        name = modules[3].name
        assert section.rows() == [[name, "gptq.damping", "raised to 0.1"], [name, "svd.rank", "cut"]]
        assert "1 module of 14" in section.text


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
        assert assert_affine(heights) > 0
        assert "seconds" in plot.text
        assert "validation" in plot.text

    def test_memory_is_drawn_to_scale_in_binary_units(self) -> None:
        plot = page(report(tasks=self.TASKS)).figure("Peak memory per task").all("svg", "plot")[0]
        bars = plot.all("rect", "host")
        sizes = [float(made.timing.host_peak_bytes) for made in self.TASKS]
        assert assert_affine([(0.0, 0.0), *zip(sizes, [b.number("height") for b in bars], strict=True)]) > 0
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
        fold = page(report(tasks=self.TASKS)).section("In full").all("details")[2]
        assert fold.all("summary")[0].text == "All tasks (3)"
        assert fold.rows()[1] == [
            "block 1", "0.500", "1.000", "8.000", "1.500", "11.000", "900 MiB", "–", "cpu", "yes",
        ]  # fmt: skip


class TestDetails:
    def test_data_is_named_with_its_digests(self) -> None:
        made = report()
        assert made.validation is not None
        text = page(made).section("Data and software").text
        for tokens in (made.calibration, made.validation):
            assert tokens.digest in text
            assert tokens.source["uri"] in text
        assert "64 windows of 256 tokens: 16,384 in all" in text
        assert "32 windows of 512 tokens: 16,384 in all" in text
        assert made.model.digest in text

    def test_software_is_listed(self) -> None:
        assert ["torch", "2.13.0"] in page(report()).section("Data and software").rows()

    def test_the_recipe_is_whole(self) -> None:
        import yaml

        made = report()
        text = page(made).section("In full").all("pre")[0].text
        assert yaml.safe_load(text) == made.recipe

    def test_every_module_is_tabled(self) -> None:
        made = report(mixtral())
        rows = page(made).section("In full").all("details")[1].rows()
        assert [row[0] for row in rows] == [m.name for m in made.modules]
        assert rows[0] == [
            made.modules[0].name, "64 × 128", "3", "–", "16", "4096", "9.1250", "2.0000e-02", "1.0000e-02", "0.25",
        ]  # fmt: skip
