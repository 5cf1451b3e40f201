"""The report's page: complete, safe, the same for equal reports."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html import render
from counterweight.workers.tasks.records import FallbackReport
from tests.pipeline.report_documents import (
    QUANTIZED,
    dense,
    mixtral,
    module,
    page,
    report,
    task,
)

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
        dump = _poisoned(benign.model_dump())
        dump["recipe"][PAYLOAD] = PAYLOAD
        dump["validation_dtype"] = benign.validation_dtype
        for tokens in (dump["calibration"], dump["validation"]):
            tokens["special_tokens"] = "text"
        hostile = Report.model_validate(dump)
        root = page(hostile)
        assert {n.tag for n in root.walk()} <= {n.tag for n in page(report(mixtral())).walk()} | {"h3", "figure"}
        assert not [name for node in root.walk() for name in node.attributes if name.startswith("on")]
        assert "<script" not in render(hostile)
        # Names, ids, URIs, digests, steps, causes, software, stages: shown as they are.
        assert root.all("body")[0].text.count(PAYLOAD) > 15
        assert root.all("title")[0].text == f"demo{PAYLOAD} · Counterweight report"

    def test_what_cannot_be_shown_is_replaced(self) -> None:
        made = report([module("model.layers.0.a\x00b\x1b[31m\u202ec")])
        text = render(made)
        assert not re.search("[\x00\x1b\u202e]", text)
        assert "a\ufffdb\ufffd[31m\ufffdc" in text

    def test_the_page_is_utf_8(self) -> None:
        made = report([module("model.layers.0.größe_μ")])
        assert "größe_μ" in render(made).encode().decode()


def _poisoned(value: Any, *, keys: bool = False) -> Any:
    """The dump of a report with the payload behind every string, and behind the keys of its free mappings."""
    if isinstance(value, dict):
        free = {"source", "stages", "software"}
        return {f"{k}{PAYLOAD}" if keys else k: _poisoned(v, keys=k in free) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_poisoned(item) for item in value]
    return value + PAYLOAD if isinstance(value, str) and PAYLOAD not in value else value


class TestQuality:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_says_what_the_models_computed_in(self, dtype: str) -> None:
        made = report().model_copy(update={"validation_dtype": dtype})
        text = page(made).all("body")[0].text
        assert re.search(rf"side by side on \d+ windows of \d+ tokens, in {dtype}\.", text)


class TestHeadline:
    def test_says_what_was_made_of_what(self) -> None:
        header = page(report()).all("header")[0].text
        for text in ("demo", "3f9a1c07be52d481", "file:///models/demo", "llama", "1,412,352 parameters"):
            assert text in header
        assert "W3 per channel, GPTQ + low rank 16 (svd, full whitening)" in header

    def test_its_figures_are_the_reports(self) -> None:
        values = [node.text for node in page(report()).all("div", "value")]
        assert values == ["13.271", "0.0712", "61.4 %", "3.438"]


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
        with_store = report([module("model.layers.0.a", residual_bits=64 * 128 * 4)])
        assert page(with_store).section("In full").all("details")[1].rows()[0][6] == "13.1250"
        assert rows[0] == [
            made.modules[0].name, "64 × 128", "3", "–", "16", "4096", "9.1250", "2.0000e-02", "1.0000e-02",
            "in-sample", "0.25",
        ]  # fmt: skip
