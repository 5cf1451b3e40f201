"""The parts that the report's page is made of: escaping, scales, texts, and what modules say together."""

from __future__ import annotations

from math import log10
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterweight.pipeline.artifact.report_html.markup import Markup, escape, join, number, tag
from counterweight.pipeline.artifact.report_html.modules import Place, expert_tokens, panels, place_of, starved
from counterweight.pipeline.artifact.report_html.svg import Linear, Logarithmic, around, round_step
from counterweight.pipeline.artifact.report_html.text import count, exact, percent, power_of_ten, recipe_line
from counterweight.workers.methods.activations import Activations
from counterweight.workers.methods.compensations import SVD
from counterweight.workers.methods.compensations.rank import CountRank, EnergyRank, FractionRank
from counterweight.workers.methods.quantizers import RTN
from counterweight.workers.methods.residual import Residual
from counterweight.workers.methods.weights import Weights
from counterweight.workers.recipe import Override, Recipe
from tests.pipeline.report_documents import mixtral, module, read


class TestMarkup:
    def test_text_is_escaped_once(self) -> None:
        assert tag("p", "a<b>&\"'", tag("b", "&")) == "<p>a&lt;b&gt;&amp;&quot;&#x27;<b>&amp;</b></p>"

    def test_attributes_are_escaped_and_named(self) -> None:
        made = tag("td", class_="a", data_value='"<', title=None, colspan=2)
        assert made == '<td class="a" data-value="&quot;&lt;" colspan="2"></td>'

    def test_only_leaves_close_themselves(self) -> None:
        assert tag("rect", x=1.0) == '<rect x="1"/>'
        assert tag("rect", tag("title", "t")) == "<rect><title>t</title></rect>"
        assert tag("div") == "<div></div>"

    @pytest.mark.parametrize(
        "character", ["\x00", "\x1b", "\r", "\x7f", "\x85", "\ud800", "\u202e", "\u2066", "\u200f"]
    )
    def test_hidden_characters_are_replaced(self, character: str) -> None:
        assert escape(f"a{character}b") == "a\ufffdb"

    def test_others_stay(self) -> None:
        assert escape("a\n\tµ𝛼é中") == "a\n\tµ𝛼é中"

    @given(st.text(max_size=50))
    def test_any_text_stays_text_and_can_be_written(self, text: str) -> None:
        page = f"<!DOCTYPE html>\n{tag('p', text, title=text)}"
        (paragraph,) = read(page.encode().decode()).all("p")
        assert paragraph.children in ([], [escape_seen(text)])
        assert paragraph.attributes["title"] == escape_seen(text)

    def test_join_trusts_markup_alone(self) -> None:
        assert join([Markup("<b>"), "<b>"]) == "<b>&lt;b&gt;"

    @pytest.mark.parametrize(
        ("value", "text"), [(1.0, "1"), (1.005, "1"), (0.126, "0.13"), (-0.001, "0"), (100, "100")]
    )
    def test_numbers_are_short(self, value: float, text: str) -> None:
        assert number(value) == text


def escape_seen(text: str) -> str:
    """What a reader sees of an escaped text."""
    import html

    return html.unescape(escape(text))


class TestScales:
    def test_linear_maps_its_ends_and_stays_within_them(self) -> None:
        scale = Linear(2.0, 4.0, 100.0, 0.0)
        assert [scale.at(v) for v in (2, 3, 4, 1, 9)] == [100, 50, 0, 100, 0]

    def test_logarithmic_maps_ratios_to_distances(self) -> None:
        scale = Logarithmic(0.001, 1.0, 90.0, 0.0)
        assert [scale.at(v) for v in (0.001, 0.01, 0.1, 1.0)] == pytest.approx([90, 60, 30, 0])
        assert scale.at(0.0) == scale.at(-1.0) == 90.0

    @pytest.mark.parametrize(
        ("scale", "labels"),
        [
            (Linear(0, 10, 0, 1), ["0", "2", "4", "6", "8", "10"]),
            (Linear(0, 0.9, 0, 1), ["0.0", "0.2", "0.4", "0.6", "0.8"]),
            (Linear(-0.5, 5.5, 0, 1, count=6, whole=True), ["0", "1", "2", "3", "4", "5"]),
            (Linear(-0.5, 0.5, 0, 1, count=6, whole=True), ["0"]),
            (Linear(-0.5, 99.5, 0, 1, count=6, whole=True), ["0", "20", "40", "60", "80"]),
            (Linear(0, 12000, 0, 1, count=3), ["0", "5,000", "10,000"]),
            (Logarithmic(0.002, 0.05, 0, 1), ["0.002", "0.005", "0.01", "0.02", "0.05"]),
            (Logarithmic(1e-4, 1e-1, 0, 1), ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹"]),
            (Logarithmic(1e-14, 1.0, 0, 1), ["10⁻¹⁴", "10⁻¹¹", "10⁻⁸", "10⁻⁵", "10⁻²"]),
        ],
    )
    def test_ticks_are_round(self, scale: Linear | Logarithmic, labels: list[str]) -> None:
        assert [tick.label for tick in scale.ticks()] == labels

    @given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=5))
    def test_an_axis_around_values_holds_them_and_has_ticks(self, values: list[float]) -> None:
        scale = around(values, 100.0, 0.0)
        assert scale.low <= min(values) * (1 + 1e-9)
        assert scale.high >= max(values) * (1 - 1e-9)
        ticks = scale.ticks()
        assert 2 <= len(ticks) <= 10
        for value in values:
            expected = 100 * (1 - (log10(value) - log10(scale.low)) / (log10(scale.high) - log10(scale.low)))
            assert scale.at(value) == pytest.approx(expected, abs=1e-6)

    @given(st.floats(1e-200, 1e200))
    def test_steps_are_one_two_or_five(self, least: float) -> None:
        step = round_step(least)
        assert least * (1 - 1e-9) <= step <= least * 2.5 * (1 + 1e-9)
        assert f"{step:.0e}"[0] in "125"


class TestTexts:
    def test_a_figure_carries_its_exact_value(self) -> None:
        assert exact(1 / 3, ".2f") == f'<data value="{1 / 3!r}" title="{1 / 3!r}">0.33</data>'
        assert exact(0.25, ".2f") == '<data value="0.25">0.25</data>'
        assert exact(None, ".2f") == "<span>–</span>"

    def test_shares_counts_and_powers(self) -> None:
        assert percent(0.6134) == "61.3 %"
        assert [count(1, "block"), count(1024, "block"), count(2, "task was", "tasks were")] == [
            "1 block",
            "1,024 blocks",
            "2 tasks were",
        ]
        assert [power_of_ten(n) for n in (-3, 0, 1, 12)] == ["10⁻³", "1", "10", "10¹²"]

    @pytest.mark.parametrize(
        ("recipe", "line"),
        [
            (
                Recipe(weights=Weights(bits=3), compensation=SVD(whitening="full", rank=CountRank(count=16))),
                "W3 per channel, GPTQ + low rank 16 (svd, full whitening)",
            ),
            (
                Recipe(
                    weights=Weights(bits=4, group_size=128, symmetric=False, quantizer=RTN()),
                    activations=Activations(),
                    compensation=SVD(whitening="none", rank=FractionRank(fraction=0.1)),
                ),
                "W4A8 in groups of 128, asymmetric, RTN + low rank 10 % (svd, no whitening)",
            ),
            (
                Recipe(weights=Weights(bits=8), overrides=(Override(match="*", weights=Weights(bits=2)),)),
                "W8 per channel, GPTQ, no compensation; 1 override",
            ),
            (
                Recipe(weights=Weights(), compensation=SVD(whitening="full", rank=EnergyRank(energy=0.5))),
                "W4 per channel, GPTQ + low rank by energy 0.5 (svd, full whitening)",
            ),
            (
                Recipe(weights=Weights(bits=3, quantizer=RTN()), residual=Residual()),
                "W3 per channel, RTN + residual store of 4 bits",
            ),
            (
                Recipe(weights=Weights(), compensation=SVD(rank=CountRank(count=4)), residual=Residual()),
                "W4 per channel, GPTQ + low rank 4 (svd, full whitening) + residual store of 4 bits",
            ),
        ],
    )
    def test_a_recipe_is_one_line(self, recipe: Recipe, line: str) -> None:
        assert recipe_line({"recipe": recipe.model_dump(mode="json")}) == line

    @pytest.mark.parametrize(
        "document",
        [
            {},
            {"recipe": None},
            {"recipe": {"weights": []}},
            {"recipe": {"weights": {"quantizer": 5}, "compensation": {"kind": "new", "rank": [1]}, "overrides": "x"}},
        ],
    )
    def test_an_unknown_recipe_is_no_error(self, document: dict[str, Any]) -> None:
        assert recipe_line(document)


class TestModules:
    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("model.layers.12.self_attn.q_proj", Place(12, None, "q_proj")),
            ("layers.0.mlp.down_proj", Place(0, None, "down_proj")),
            ("model.layers.3.block_sparse_moe.experts.7.w2", Place(3, 7, "experts: down (w2)")),
            ("model.layers.3.mlp.experts.127.gate_proj", Place(3, 127, "experts: gate_proj")),
            ("model.layers.4.mlp.shared_experts.up_proj", Place(4, None, "shared experts: up_proj")),
            ("model.layers.x.q_proj", Place(0, None, "other")),
            ("model.layers.1.", Place(0, None, "other")),
            ("", Place(0, None, "other")),
            ("model.layers.99999999999.q_proj", Place(0, None, "other")),
            ("model.layers.٣.q_proj", Place(0, None, "other")),
        ],
    )
    def test_a_name_says_where_a_module_stands(self, name: str, place: Place) -> None:
        assert place_of(name) == place

    def test_panels_hold_every_measured_module_once(self) -> None:
        modules = [*mixtral(2, 3), module("model.layers.1.mlp.extra", None, None)]
        found = panels(reversed(modules))
        names = [name for panel in found for spread in panel.spreads for name in spread.names]
        assert sorted(names) == sorted(m.name for m in modules[:-1])
        assert sum(panel.unmeasured for panel in found) == 1
        assert [spread.block for spread in found[0].spreads] == [0, 1]
        assert [panel.several for panel in found] == [False] * 4 + [False] + [True] * 3

    def test_experts_are_compared_with_their_own_block(self) -> None:
        modules = [module(f"layers.{b}.experts.{e}.w1", tokens=t) for b, e, t in ((0, 0, 10), (0, 1, 30), (2, 0, 0))]
        found = expert_tokens(modules)
        assert found is not None
        assert (found.blocks, found.experts) == ((0, 2), (0, 1))
        assert [found.share(0, 0), found.share(0, 1), found.share(2, 0)] == [0.5, 1.5, 0.0]

    def test_a_dense_model_has_no_experts(self) -> None:
        assert expert_tokens([module("model.layers.0.mlp.up_proj")]) is None

    def test_as_many_tokens_as_columns_are_enough(self) -> None:
        modules = [module(f"layers.{n}.x", tokens=n, columns=3) for n in (3, 2, 0)]
        assert [group.tokens for group in starved(modules)] == [0, 2]
