"""What the report says of the spectra of branches."""

from __future__ import annotations

from counterweight.pipeline.artifact.report_html.spectra import spectra
from counterweight.workers.tasks.records import HeldOutErrors, ModuleReport
from tests.pipeline.report_documents import dense, module, page, report


def spread(name: str, *shares: float) -> ModuleReport:
    held_out = HeldOutErrors(tokens=64, quantized=0.02, compensated=0.01, spectrum=shares)
    return module(name, rank=1 << len(shares) - 1).model_copy(update={"held_out": held_out})


MODULES = [
    spread("model.layers.0.self_attn.q_proj", 0.25, 0.5, 1.0),
    spread("model.layers.1.self_attn.q_proj", 0.75, 0.875, 1.0),
    spread("model.layers.2.self_attn.q_proj", 0.5, 1.0),
    spread("model.layers.0.mlp.down_proj", 0.125, 1.0),
]


def test_a_kind_has_the_range_and_the_median_of_its_branches() -> None:
    query, down = spectra([*MODULES, module("model.layers.3.mlp.down_proj")])
    assert (query.kind, query.steps) == ("q_proj", [(0.25, 0.5, 0.75), (0.5, 0.875, 1.0), (1.0, 1.0, 1.0)])
    assert (down.kind, down.steps) == ("down_proj", [(0.125, 0.125, 0.125), (1.0, 1.0, 1.0)])


def test_the_page_draws_each_kind_to_scale() -> None:
    section = page(report(modules=MODULES)).section("Spectra of branches")
    assert [plot.all("text", "strong")[0].text for plot in section.all("svg")] == ["q_proj", "down_proj"]
    (line,) = section.all("svg")[0].all("polyline", "curve")
    heights = [float(point.split(",")[1]) for point in line.attributes["points"].split()]
    area = section.all("svg")[0].all("line", "grid")
    zero, one = (row.number("y1") for row in (area[0], area[-1]))
    assert [round((zero - height) / (zero - one), 3) for height in heights] == [0.5, 0.875, 1.0]
    assert "4 branches" in section.text


def test_without_branches_there_is_no_such_section() -> None:
    assert "Spectra" not in page(report(modules=dense(2))).text
