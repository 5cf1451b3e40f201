"""An attempt as a process: what it takes in, how it ends, that it dies with its driver; the command is a small script."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from counterweight.pipeline.jobs import attempt as module
from counterweight.pipeline.jobs.attempt import Exit, ProcessAttempt
from counterweight.pipeline.jobs.logs import LogReader
from counterweight.pipeline.jobs.record import JobRecord
from counterweight.pipeline.jobs.store import JobStore
from counterweight.pipeline.segments import SegmentWriter
from tests.patience import PATIENCE
from tests.pipeline.jobs.memory import MemoryStore, record

STARTED = Callable[..., ProcessAttempt]


def waited(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def jobs() -> JobStore:
    return JobStore(MemoryStore())


@pytest.fixture
def started(tmp_path: Path, jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> STARTED:
    """Starts an attempt whose interpreter is a shell script; $4 is the manifest."""

    def start(script: str, *, arguments: tuple[str, ...] = (), beside: tuple[JobRecord, ...] = ()) -> ProcessAttempt:
        command = tmp_path / "command"
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
        monkeypatch.setattr(module.sys, "executable", str(command))
        log = SegmentWriter(
            jobs.store, jobs.log_prefix("0" * 16, 1), "log", lambda text: None, suffix="log", seconds=0.02
        )
        log.begin()
        return ProcessAttempt(record(), beside, log, arguments=arguments)

    return start


def ended(attempt: ProcessAttempt) -> Exit:
    found: list[Exit] = []

    def over() -> bool:
        exit_ = attempt.poll()
        found.extend([] if exit_ is None else [exit_])
        return exit_ is not None

    waited(over)
    attempt.close()
    return found[0]


def said(jobs: JobStore) -> list[str]:
    return [line.text for line in LogReader(jobs, "0" * 16).lines()]


def test_success_is_the_artifact_of_its_document(started: STARTED, jobs: JobStore) -> None:
    attempt = started('echo "stage blocks" >&2; echo \'{"uri": "file:///out/tiny/1"}\'')
    assert ended(attempt) == Exit(0, "stage blocks", "file:///out/tiny/1")
    assert said(jobs) == ["stage blocks"]


def test_it_is_the_run_command_on_the_recorded_manifest(started: STARTED) -> None:
    attempt = started('echo "$@" >&2; grep -o file:///jobs/model "$4" >&2', arguments=("--address", "auto"))
    assert ended(attempt).line == "file:///jobs/model"
    attempt = started('echo "$@" >&2', arguments=("--address", "auto"))
    words = ended(attempt).line.split()
    assert words[:3] == ["-m", "counterweight.pipeline.cli", "run"]
    assert words[4:] == ["--json", "--address", "auto"]


def test_a_failure_is_its_exit_code_and_the_last_error(started: STARTED) -> None:
    attempt = started("echo 'error: spec.model.uri: absent' >&2; echo 'and a warning' >&2; exit 2")
    assert ended(attempt) == Exit(2, "spec.model.uri: absent", None)


def test_a_death_is_its_signal(started: STARTED) -> None:
    assert ended(started("kill -9 $$")).code == -signal.SIGKILL


def test_it_ends_when_it_is_asked_to_and_at_the_latest_when_its_grace_is_over(
    started: STARTED, jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = started("echo ready >&2; while :; do sleep 0.02; done")
    waited(lambda: attempt.poll() is None and "ready" in said(jobs))
    attempt.terminate()
    assert ended(attempt).code == -signal.SIGTERM
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    attempt = started("trap '' TERM; echo deaf >&2; while :; do sleep 0.02; done")
    waited(lambda: attempt.poll() is None and "deaf" in said(jobs))
    attempt.terminate()
    assert ended(attempt).code == -signal.SIGKILL


def test_secrets_of_the_environment_and_of_uris_are_in_no_log_and_no_cause(
    started: STARTED, jobs: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI-K7MDENG")
    attempt = started(
        'echo "error: $AWS_SECRET_ACCESS_KEY at https://me:hush@host/x?X-Amz-Signature=abcdef, hf_abcdefghijk" >&2; exit 4'
    )
    found = ended(attempt)
    for text in (found.line, *said(jobs)):
        assert text
        for secret in ("wJalrXUtnFEMI", "hush", "abcdef", "hf_abcdefghijk"):
            assert secret not in text
    stored = b"".join(data for data, _ in jobs.store.objects.values())  # type: ignore[attr-defined]
    assert b"wJalrXUtnFEMI" not in stored


def test_it_dies_with_its_driver(tmp_path: Path) -> None:
    """However that one ends: it is killed here, and cannot clean up."""
    pid = tmp_path / "pid"
    command = tmp_path / "command"
    command.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}; while :; do sleep 0.05; done\n")
    command.chmod(0o755)
    script = (
        "import sys, time; from tests.pipeline.jobs.memory import MemoryStore, record\n"
        "from counterweight.pipeline.jobs.attempt import ProcessAttempt\n"
        "from counterweight.pipeline.segments import SegmentWriter\n"
        f"sys.executable = {str(command)!r}\n"
        "attempt = ProcessAttempt(record(), [], SegmentWriter(MemoryStore(), 'x', 'log', print))\n"
        "time.sleep(10000)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[3])
    try:
        waited(pid.exists)
    finally:
        driver.kill()
        driver.wait()
    child = Path("/proc") / pid.read_text().strip() / "stat"
    waited(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")


def test_jobs_of_one_calibration_are_told_to_the_run(started: STARTED, tmp_path: Path) -> None:
    other = record("another")
    attempt = started(
        f'for one in "$@"; do case $one in --beside=*) cat "${{one#*=}}" > {tmp_path}/beside;; esac; done',
        beside=(other,),
    )
    assert ended(attempt).code == 0
    assert (tmp_path / "beside").read_bytes() == other.manifest.model_dump_json().encode()
