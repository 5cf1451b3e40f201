"""MLflow's own server and client, in an environment of their own: `make mlflow-test`. Skipped without COUNTERWEIGHT_MLFLOW."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterweight.pipeline.events import ArtifactPublished, JobStarted
from counterweight.pipeline.observability.sinks import SINKS, sinks
from tests.patience import PATIENCE
from tests.pipeline.service.test_service_batches import FILES, ID, artifact

PLACE = os.environ.get("COUNTERWEIGHT_MLFLOW")
"""The folder of that environment."""

pytestmark = pytest.mark.skipif(PLACE is None, reason="no COUNTERWEIGHT_MLFLOW")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a tracking server with a database and a folder for artifacts."""
    assert PLACE is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'runs.db'}",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    command = [f"{PLACE}/bin/mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *options]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (tmp_path / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_a_run_is_there_with_its_recipe_figures_and_report(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, *map(str, Path(str(PLACE)).glob("lib/python3*/site-packages"))])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    report = {"report/report.json": b"{}", "report/report.html": b"<p>"}
    uri = artifact(tmp_path / "out", files={**FILES, **report})
    notes: list[str] = []
    (tracking,) = sinks({SINKS: "mlflow"}, notes.append)
    for event in (JobStarted("tiny", "0" * 16, 1), ArtifactPublished(uri, False)):
        tracking.on(event)
    assert notes == []
    assert capsys.readouterr().out == "", "the URI of the artifact is all that a run prints on stdout"

    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.tags["counterweight.id"] == ID
    assert run.data.metrics["bits_per_weight.total"] == 4
    kept = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert kept == set(report)
