"""The real service and a real driver: a tiny job, submitted, watched and pulled over HTTP alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from counterweight.pipeline.artifact import verify
from counterweight.pipeline.cli import main
from tests.patience import PATIENCE
from tests.pipeline.tiny import write_job

pytestmark = pytest.mark.end_to_end

TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With absolute URIs."""
    path = write_job(tmp_path_factory.mktemp("job"))
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    spec = document["spec"]
    for place in (spec["model"], spec["calibration"]["source"], spec["validation"]["text"], spec["output"]):
        place["uri"] = (path.parent / place["uri"]).as_uri()
    return document


@pytest.fixture
def service(tmp_path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """The URL of a service whose jobs are in tmp_path/store."""
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([{"name": "me", "role": "submitter", "sha256": digest}]))
    root = manifest["spec"]["output"]["uri"].rpartition("/")[0]
    command = ["serve", "--store", str(tmp_path / "store"), "--allow", root, "--tokens", str(tokens), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "counterweight.pipeline.cli", *command], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:[0-9]+", line)))
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def test_a_job_over_http(service: str, manifest: dict[str, Any], tmp_path: Path) -> None:
    with httpx.Client(base_url=service, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE) as client:
        assert client.get("/readyz").json() == {"status": "ok"}
        made = client.post("/v1/jobs", json=manifest)
        assert made.status_code == 201, made.text
        id = made.json()["id"]
        work = ["work", "--store", str(tmp_path / "store"), "--until", id]
        with (tmp_path / "driver.log").open("wb") as log:
            driver = subprocess.Popen(
                [sys.executable, "-m", "counterweight.pipeline.cli", *work], stderr=log, env=dict(os.environ)
            )
        kinds = []
        with client.stream("GET", f"/v1/jobs/{id}/events") as events:
            for line in events.iter_lines():
                if line.startswith("event: "):
                    kinds.append(line.removeprefix("event: "))
        assert driver.wait(PATIENCE) == 0
        assert kinds[0] == "state"
        assert {"job_started", "planned", "block_done", "artifact_published"} <= set(kinds)
        assert kinds[-1] == "end"
        facts = client.get(f"/v1/jobs/{id}").json()
        assert (facts["state"], facts["attempts"]) == ("succeeded", 1)
        assert "event: line" in client.get(f"/v1/jobs/{id}/logs").text

        name, artifact = facts["artifact"].split("/")[-2:]
        files = client.get(f"/v1/artifacts/{name}/{artifact}/urls").json()["files"]
        pulled = tmp_path / "pulled"
        for path, file in files.items():
            target = pulled / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(client.get(file["url"]).content)
    assert verify(pulled.as_uri()).id == artifact
    assert httpx.get(f"{service}/v1/jobs").status_code == 401


def test_what_serve_needs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("COUNTERWEIGHT_TOKENS", raising=False)
    assert main(["serve", "--store", str(tmp_path)]) == 2
    assert "no tokens: expected --tokens FILE or COUNTERWEIGHT_TOKENS" in capsys.readouterr().err
    monkeypatch.setenv("COUNTERWEIGHT_TOKENS", '[{"name": "a", "role": "king", "sha256": "x"}]')
    assert main(["serve", "--store", str(tmp_path)]) == 2
    assert "COUNTERWEIGHT_TOKENS: '0.role'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--store", str(tmp_path)]) == 2
    assert "expected pip install 'counterweight[service]'" in capsys.readouterr().err
