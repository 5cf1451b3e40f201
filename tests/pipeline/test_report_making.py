"""What a report says of how it was made: sizes, machine, command, timeline, the run before."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from counterweight.pipeline.artifact.making import Earlier, Host, Making, Sizes, Span, Timeline, command_line, this_host
from counterweight.pipeline.artifact.report import Report
from counterweight.pipeline.artifact.report_html import render
from counterweight.pipeline.events import Note, TaskFinished
from counterweight.pipeline.schemas import KINDS, schema_of
from counterweight.workers.errors import RequestError
from tests.pipeline.report_documents import Node, read, report
from tests.pipeline.tiny import job_of, local_path, run_local, write_job

HOST = Host(processor="A processor", cores=2, memory=8 << 30, system="Linux 6", python="3.11.7")


def spans() -> tuple[Span, ...]:
    return (
        Span(task="inventory", kind="inspect", worker=0, start=0.0, seconds=1.0),
        Span(task="block 0 (calibrate)", kind="forward", worker=0, start=1.0, seconds=2.0),
        Span(task="block 0 (compress)", kind="block", worker=1, start=3.0, seconds=1.0),
    )


def made() -> Report:
    return report().model_copy(
        update={
            "sizes": Sizes(source=400 << 20, artifact=100 << 20),
            "making": Making(command="counterweight run job.yaml", host=HOST, workers=2, spans=spans()),
            "earlier": Earlier(
                id="0" * 16,
                created="2026-11-21",
                bits=4.0,
                qualities={"compensated": {"perplexity": 14.0, "kl": 0.1, "top1_agreement": 0.8}},
                recipe={"recipe": {"weights": {"bits": 4, "group_size": None}}},
            ),
        }
    )


@pytest.fixture(scope="module")
def page() -> Node:
    return read(render(made()))


def test_sizes_and_their_ratio_stand_in_the_header(page: Node) -> None:
    assert "400 MiB before, 100 MiB after: 4.00 times smaller" in page.all("header")[0].text


def test_host_command_and_utilisation_are_told(page: Node) -> None:
    text = page.section("How it was made").text
    for told in (
        "counterweight run job.yaml",
        "A processor, 2 cores, 8.00 GiB, Linux 6",
        "3.11.7",
        "50.0 % of the workers' 4.0 s",
    ):
        assert told in text


def test_a_bar_lies_where_its_task_ran(page: Node) -> None:
    bars = [bar for bar in page.figure("Tasks by worker").all("rect") if bar.all("title")]
    assert [bar.classes for bar in bars] == [["load"], ["forward"], ["solve"]]
    per_second = bars[0].number("width")
    assert bars[1].number("x") == pytest.approx(bars[0].number("x") + per_second, abs=0.02)
    assert bars[1].number("width") == pytest.approx(2 * per_second, abs=0.02)
    assert bars[2].number("y") > bars[1].number("y")


def test_the_run_before_is_compared(page: Node) -> None:
    section = page.section("Beside the run before")
    rows = {row[0]: row[1:] for row in section.rows()}
    assert rows["bits per weight"] == ["4.000", "3.438", "-0.5625"]
    assert rows["perplexity, compensated"][:2] == ["14.0000", "13.2712"]
    assert rows["perplexity, quantized"][0] == "–"
    assert "recipe.weights.bits: 4 → 3" in section.text


def test_modules_are_shown_in_other_orders(page: Node) -> None:
    folds = {fold.all("summary")[0].text: fold for fold in page.all("details")}
    errors = [float(row[7]) for row in folds["Modules by: largest error"].rows()]
    assert errors == sorted(errors, reverse=True)
    assert errors != [float(row[7]) for row in folds["All modules (14)"].rows()]


def test_an_older_report_has_none_of_it() -> None:
    text = render(report())
    assert "How it was made" not in text
    assert "Beside the run before" not in text


def test_a_timeline_is_made_of_events() -> None:
    timeline = Timeline()
    timeline.on(Note("nothing to do with it"))
    timeline.on(TaskFinished("b", "block", 1, 2.0, time=107.0))
    timeline.on(TaskFinished("a", "inspect", 0, 3.0, time=103.0))
    making = timeline.making(2)
    assert [(span.task, span.start, span.seconds) for span in making.spans] == [("a", 0.0, 3.0), ("b", 5.0, 2.0)]
    assert making.seconds == 7.0
    assert making.utilisation == pytest.approx(5 / 14)
    assert Timeline().making(1).utilisation is None


def test_a_command_has_no_credentials_and_no_path() -> None:
    typed = ["/home/me/.venv/bin/counterweight", "run", "s3://key:secret@host/job.yaml", "--set", "a=b c"]
    assert command_line(typed) == "counterweight run s3://***@host/job.yaml --set 'a=b c'"


def test_this_machine_is_described_without_its_name() -> None:
    host = this_host()
    assert host.cores >= 1
    assert host.memory > 1 << 28
    assert host.processor


class TestAJob:
    @pytest.fixture(scope="class")
    def artifacts(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        manifest = write_job(tmp_path_factory.mktemp("job"), layers=2)
        first = run_local(job_of(manifest))
        second = run_local(job_of(manifest, "spec.recipe.weights.bits=3"))
        return local_path(first.uri), local_path(second.uri)

    def test_sizes_are_those_of_the_files(self, artifacts: tuple[Path, Path]) -> None:
        first, second = (Report.model_validate_json((place / "report/report.json").read_bytes()) for place in artifacts)
        assert first.sizes is not None
        assert second.sizes is not None
        written = [
            path.stat().st_size
            for path in artifacts[0].rglob("*")
            if path.is_file() and path.parent.name != "report" and path.name not in ("artifact.json", "README.md")
        ]
        assert first.sizes.artifact == sum(written)
        assert first.sizes.source > first.sizes.artifact > second.sizes.artifact

    def test_the_second_knows_the_first(self, artifacts: tuple[Path, Path]) -> None:
        first, second = (Report.model_validate_json((place / "report/report.json").read_bytes()) for place in artifacts)
        assert first.earlier is None
        assert second.earlier is not None
        assert second.earlier.id == first.id
        assert second.earlier.bits == first.bits_per_weight.total
        assert second.making is not None
        assert {span.kind for span in second.making.spans} >= {"inspect", "block", "evaluate"}

    @pytest.mark.parametrize(
        ("kind", "path"),
        [("artifact", "artifact.json"), ("ledger", "ledger.json"), ("report", "report/report.json")],
    )
    def test_documents_are_what_their_schema_says(self, kind: str, path: str, artifacts: tuple[Path, Path]) -> None:
        schema = json.loads(schema_of(kind))
        validator = jsonschema.Draft202012Validator(schema)
        validator.check_schema(schema)
        document = json.loads((artifacts[1] / path).read_bytes())
        validator.validate(document)
        required = next(name for name in schema["required"])
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({name: value for name, value in document.items() if name != required})


def test_schemas_of_unknown_kinds_are_refused() -> None:
    with pytest.raises(RequestError, match="expected manifest, artifact, ledger, report"):
        schema_of("letter")
    assert set(KINDS) == {"manifest", "artifact", "ledger", "report"}
