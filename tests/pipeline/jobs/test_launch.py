"""How a driver is started: what Ray's Job Submission is asked for, and what a detached process does."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.jobs.launch import launch
from counterweight.pipeline.jobs.states import State
from counterweight.pipeline.jobs.store import JobStore
from counterweight.workers.errors import RequestError, SurroundingsError
from counterweight.workers.storage.file import FileStore
from tests.patience import PATIENCE
from tests.pipeline.jobs.memory import submitted

ID = "0123456789abcdef"


class JobsApi(HTTPServer):
    """The one request of Ray's Job Submission API that is used, as Ray 2.60 answers it. refuses: with what."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.submitted: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.refuses = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: JobsApi

    def do_POST(self) -> None:
        assert (self.path, self.headers["Content-Type"]) == ("/api/jobs/", "application/json")
        self.server.tokens.append(self.headers.get("Authorization"))
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.refuses:
            self._answer(500, self.server.refuses)
            return
        self.server.submitted.append(asked)
        self._answer(200, {"job_id": asked["submission_id"], "submission_id": asked["submission_id"]})

    def _answer(self, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[JobsApi]:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    server = JobsApi()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_rays_job_is_a_driver_that_stays_until_the_job_is_at_its_end(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI-K7MDENG")
    said = launch("s3://jobs/a b", ID, dashboard=api.address, python="/opt/venv/bin/python")
    (asked,) = api.submitted
    assert shlex.split(asked["entrypoint"]) == [
        *("/opt/venv/bin/python", "-m", "counterweight.pipeline.cli", "work"),
        *("--store", "s3://jobs/a b", "--until", ID, "--address", "auto"),
    ]
    assert asked["submission_id"].startswith(f"counterweight-{ID}-")
    assert asked["submission_id"] in said
    assert "wJalrXUtnFEMI" not in json.dumps(asked)
    launch("s3://jobs/a b", ID, dashboard=api.address)
    assert api.submitted[1]["submission_id"] != asked["submission_id"]
    assert shlex.split(api.submitted[1]["entrypoint"])[0] == sys.executable


def test_a_refusal_is_one_line_of_the_surroundings(api: JobsApi) -> None:
    api.refuses = "No available agent to submit job\nTraceback"
    with pytest.raises(SurroundingsError, match="No available agent") as caught:
        launch("s3://jobs", ID, dashboard=api.address)
    assert "\n" not in str(caught.value)


def test_rays_token_is_sent_where_there_is_one(api: JobsApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("s3://jobs", ID, dashboard=api.address)
    (tmp_path / "token").write_text("of-a-file\n")
    launch("s3://jobs", ID, dashboard=api.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-the-environment")
    launch("s3://jobs", ID, dashboard=f"{api.address}/")
    assert api.tokens == [None, "Bearer of-a-file", "Bearer of-the-environment"]


@pytest.mark.parametrize("address", ["auto", "ray://host:10001", "file:///etc/passwd"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match="expected http://host:port"):
        launch("s3://jobs", ID, dashboard=address)


def test_a_cluster_that_is_not_there_is_one_line_of_the_surroundings() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SurroundingsError, match=f"127.0.0.1:{port}"):
        launch("s3://jobs", ID, dashboard=f"http://127.0.0.1:{port}")


def test_without_a_cluster_a_process_drives_the_job_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This job's model is not there, which is an end too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    jobs = JobStore(FileStore(tmp_path / "store"))
    (id,) = submitted(jobs, "tiny")
    said = launch(jobs.store.uri, id, dashboard=None)
    deadline = time.monotonic() + PATIENCE
    while not jobs.get(id).state.terminal:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert jobs.get(id).state is State.FAILED
    (log,) = (tmp_path / "state" / "counterweight").glob(f"drive-{id}-*.log")
    assert str(log) in said
