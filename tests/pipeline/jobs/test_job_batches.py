"""Batches in a store, the commands about them, and what is said of their artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from counterweight.pipeline.cli import main
from counterweight.pipeline.jobs.batch import get_batch
from counterweight.pipeline.jobs.batch_page import render_batch
from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.pareto import Point, Summary, front, summary
from counterweight.pipeline.jobs.states import Cause, State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.workers.storage.file import FileStore
from tests.pipeline.manifest_documents import FULL

PATIENT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""

RANK = "spec.recipe.compensation.rank.count"


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(FileStore(tmp_path / "store"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command that succeeds; what it prints, as JSON."""
    monkeypatch.setenv("COUNTERWEIGHT_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)

    def run(*arguments: object) -> Any:
        code = main([*(str(argument) for argument in arguments), "--json"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(FULL)
    path = tmp_path / "batch.yaml"
    path.write_text(f"""\
apiVersion: counterweight/v1
kind: CompressionBatch
metadata: {{name: ranks}}
spec:
  jobs: [job.yaml]
  matrix: {{{RANK}: [1, 2, 4]}}
  concurrency: 2
  max_failures: 0
""")
    return path


def finish(jobs: JobStore, id: str, ended: Ended) -> None:
    lease = take(jobs, id, "a")
    assert lease is not None
    assert lease.end(ended)


def publish(jobs: JobStore, root: Path, id: str, bits: float, perplexity: float, kl: float) -> None:
    """An end with an artifact that holds a report of these figures."""
    report = root / id / "report"
    report.mkdir(parents=True)
    found = {"perplexity": perplexity, "kl": kl, "top1_agreement": 0.9}
    document = {"bits_per_weight": {"total": bits}, "compensated": found, "baseline": {**found, "perplexity": 10.0}}
    (report / "report.json").write_text(json.dumps(document))
    finish(jobs, id, Ended(cause=Cause.DONE, exit_code=0, artifact=(root / id).as_uri()))


def test_a_batch_is_submitted_once_and_its_jobs_with_it(
    command: Callable[..., Any], manifest: Path, jobs: JobStore
) -> None:
    first = command("submit", manifest, "--no-drive")
    second = command("submit", manifest, "--no-drive")
    assert (first["created"], second["created"], first["id"]) == (True, False, second["id"])
    assert first["counts"] == {"queued": 3}
    batch = get_batch(jobs, first["id"])
    assert [member.settings for member in batch.record.members] == [{RANK: 1}, {RANK: 2}, {RANK: 4}]
    assert {job.record.batch.concurrency for job in batch.jobs if job.record.batch} == {2}
    again = command("submit", manifest, "--no-drive", "--again")
    assert again["id"] == f"{first['id']}-1"
    assert len(command("list")) == 6
    assert len(command("list", "--batch", again["id"])) == 3
    assert [one["id"] for one in command("list", "--batches")] == [first["id"], again["id"]]


def test_as_many_drivers_are_started_as_may_run_at_once(
    command: Callable[..., Any], manifest: Path, monkeypatch: pytest.MonkeyPatch, jobs: JobStore
) -> None:
    started: list[str] = []
    monkeypatch.setattr(
        "counterweight.pipeline.jobs.launch.launch", lambda store, id, **_: started.append(id) or "a process"
    )
    said = command("submit", manifest)
    assert started == [said["id"]] * 2
    assert take(jobs, get_batch(jobs, said["id"]).jobs[0].id, "a") is not None
    command("submit", manifest)
    assert len(started) == 3


def test_no_more_jobs_start_than_the_batch_allows(command: Callable[..., Any], manifest: Path) -> None:
    command("submit", manifest, "--no-drive")
    said = command("status")
    assert (len(said["queue"]), len(said["startable"])) == (3, 2)


def test_how_many_may_fail_can_be_said_when_it_is_submitted(
    command: Callable[..., Any], manifest: Path, jobs: JobStore
) -> None:
    id = command("submit", manifest, "--no-drive", "--max-failures", 2)["id"]
    assert get_batch(jobs, id).record.max_failures == 2


def test_a_batch_stands_as_its_jobs_do(command: Callable[..., Any], manifest: Path, jobs: JobStore) -> None:
    id = command("submit", manifest, "--no-drive")["id"]
    first, second, third = (job.id for job in get_batch(jobs, id).jobs)
    assert get_batch(jobs, id).state is State.QUEUED
    finish(jobs, first, Ended(cause=Cause.DONE, exit_code=0, artifact="file:///x"))
    assert get_batch(jobs, id).state is State.RUNNING
    finish(jobs, second, Ended(cause=Cause.GATE, exit_code=3))
    assert command("status", id)["counts"] == {"queued": 1, "succeeded": 1, "failed": 1}
    assert [job["state"] for job in command("cancel", id)] == ["succeeded", "failed", "cancelled"]
    assert jobs.get(third).state is State.CANCELLED
    assert get_batch(jobs, id).state is State.FAILED


def test_the_report_compares_what_was_published(
    command: Callable[..., Any], manifest: Path, jobs: JobStore, tmp_path: Path
) -> None:
    id = command("submit", manifest, "--no-drive")["id"]
    small, middle, large = (job.id for job in get_batch(jobs, id).jobs)
    publish(jobs, tmp_path, small, 3.1, 12.0, 0.3)
    publish(jobs, tmp_path, middle, 4.0, 12.5, 0.2)
    said = command("report", id, "--output", tmp_path / "report")
    assert said["perplexity_front"] == [small]
    assert said["kl_front"] == [small, middle]
    assert (said["original"], said["points"][2]["bits"], said["points"][2]["state"]) == (10.0, None, "queued")
    assert said["points"][1]["settings"] == {RANK: 2}
    assert json.loads((tmp_path / "report" / "batch.json").read_text()) == said
    page = (tmp_path / "report" / "batch.html").read_text()
    assert page == render_batch(summary(get_batch(jobs, id)))
    for text in ("rank.count 2", small, middle, large, "12.500"):
        assert text in page


@pytest.mark.parametrize("name", ["status", "cancel", "report"])
def test_a_batch_that_is_not_there_is_exit_2(
    command: Callable[..., Any], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for id in (f"batch-{'0' * 16}", "batch-../x"):
        assert main([name, id]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_the_commands_print_for_people_too(
    command: Callable[..., Any], manifest: Path, jobs: JobStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    id = command("submit", manifest, "--no-drive")["id"]
    publish(jobs, tmp_path, get_batch(jobs, id).jobs[0].id, 3.1, 12.0, 0.3)
    for arguments, expected in (
        (["status", id], "full-rank-count-1"),
        (["list", "--batches"], "1 succeeded"),
        (["report", id], "3.100"),
        (["list"], "full-rank-count-4"),
    ):
        assert main(arguments) == 0
        assert expected in capsys.readouterr().out


figures = st.none() | st.sampled_from([1.0, 2.0, 3.0, 4.0])
points = st.lists(st.builds(lambda b, p: (b, p), figures, figures), max_size=8).map(
    lambda pairs: [Point(str(n), "x", "succeeded", {}, bits=b, perplexity=p) for n, (b, p) in enumerate(pairs)]
)


@PATIENT
@given(points)
def test_the_front_is_whoever_nobody_dominates(found: list[Point]) -> None:
    chosen = front(found, lambda point: point.perplexity)
    known = [point for point in found if point.bits is not None and point.perplexity is not None]
    assert set(chosen) <= {point.job for point in known}
    for point in known:
        pair = (point.bits, point.perplexity)
        better = [
            other
            for other in known
            if (other.bits, other.perplexity) != pair and other.bits <= pair[0] and other.perplexity <= pair[1]  # type: ignore[operator]
        ]
        assert (point.job in chosen) == (not better)
    bits = {point.job: point.bits for point in known}
    assert [bits[job] for job in chosen] == sorted(bits[job] or 0 for job in chosen)


class Page(HTMLParser):
    """What is open, and every tag that there was."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_and_runs_nothing_even_of_a_hostile_batch() -> None:
    evil = "</svg><script>alert(1)</script>\"'<img src=x onerror=alert(1)>"
    found = Summary(
        id=evil,
        name=evil,
        state=evil,
        points=(
            Point("a", evil, evil, {evil: evil}, bits=3.0, perplexity=10.0, kl=0.0),
            Point("b", evil, evil, {}, bits=4.0, perplexity=10.0, kl=0.1),
            Point("c", evil, evil, {}),
        ),
        original=None,
        perplexity_front=("a",),
        kl_front=("a",),
    )
    page = Page()
    page.feed(render_batch(found))
    page.close()
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert not {"script", "img", "iframe", "object"} & set(names)
    assert names.count("circle") == 2 * (2 + 2)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in page.tags)


def test_the_page_of_a_batch_without_any_figure_says_so() -> None:
    assert render_batch(Summary("i", "n", "queued", (), None, (), ())).count("No job has measured it.") == 2


def test_jobs_that_differ_in_their_branches_share_a_calibration(
    command: Callable[..., Any], manifest: Path, jobs: JobStore
) -> None:
    matrix = f"{{{RANK}: [1, 2], spec.recipe.weights.bits: [3, 4]}}"
    text = manifest.read_text().replace(f"{{{RANK}: [1, 2, 4]}}", matrix)
    manifest.write_text(text)
    (manifest.parent / "job.yaml").write_text(FULL.replace("propagate: compressed", "propagate: original"))

    def calibrations(id: str) -> list[str | None]:
        return [job.record.batch.calibration for job in get_batch(jobs, id).jobs if job.record.batch is not None]

    first, second, third, fourth = calibrations(command("submit", manifest, "--no-drive")["id"])
    assert first == third is not None
    assert second == fourth is not None
    assert first != second
    (manifest.parent / "job.yaml").write_text(FULL)
    assert calibrations(command("submit", manifest, "--no-drive")["id"]) == [None] * 4
