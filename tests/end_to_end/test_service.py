"""The real service, a real S3 server and a Ray cluster of two nodes: a job whose driver is killed, over HTTP and, where there
is a browser, from the page."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from counterweight.pipeline.artifact import verify
from counterweight.pipeline.cli import main
from tests.browsers import CHROMIUM, chromium
from tests.nodes import HEAD, Nodes, nodes
from tests.patience import PATIENCE
from tests.pipeline.tiny import lengthened, write_job
from tests.servers import S3Server, ceph_server

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.end_to_end

TOKEN = "a-token-of-this-test"
ROOT = "s3://jobs"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with ceph_server(tmp_path_factory.mktemp("ceph")) as started:
        yield started.with_bucket("jobs")


@pytest.fixture
def surroundings(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Two nodes with a CPU each, and the keys of the store in the environment of whoever is started."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with nodes() as made:
        for number in (HEAD, 1, 2):
            made.start(number)
        yield made


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    """With absolute URIs, and blocks that take long enough for somebody to be killed."""
    path = lengthened(write_job(tmp_path / "job", layers=4))
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    spec = document["spec"]
    for place in (spec["model"], spec["calibration"]["source"], spec["validation"]["text"]):
        place["uri"] = (path.parent / place["uri"]).as_uri()
    spec["output"]["uri"] = f"{ROOT}/out"
    spec["resources"] = {"workers": 2, "cpus_per_worker": 1}
    return document


def started(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = [sys.executable, "-m", "counterweight.pipeline.cli", *arguments]
        return subprocess.Popen(command, stderr=file, env=dict(os.environ), start_new_session=True)


@pytest.fixture
def service(surroundings: Nodes, manifest: dict[str, Any], tmp_path: Path) -> Iterator[str]:
    """Its URL."""
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    (tmp_path / "tokens.json").write_text(json.dumps([{"name": "me", "role": "submitter", "sha256": digest}]))
    allowed = ["--allow", (tmp_path / "job").as_uri(), "--allow", ROOT, "--tokens", str(tmp_path / "tokens.json")]
    command = ["serve", "--store", f"{ROOT}/store", *allowed, "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "counterweight.pipeline.cli", *command], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        yield next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:[0-9]+", line)))
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.fixture
def page() -> Iterator[Page | None]:
    """Of a browser; None where there is none."""
    if CHROMIUM is None:
        yield None
        return
    with chromium() as browser:
        opened = browser.new_page()
        opened.set_default_timeout(1000 * PATIENCE)
        yield opened


@pytest.mark.integration
def test_a_job_whose_driver_is_killed(
    service: str,
    page: Page | None,
    surroundings: Nodes,
    manifest: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if page is not None:
        page.goto(service)
        page.fill("#token", TOKEN)
        page.click("main button")
        page.click("text=Submit")
        page.fill("textarea", yaml.safe_dump(manifest))
        page.click("main button")
        page.click("a:has-text('tiny')")
        page.wait_for_url("**/jobs/*")
    work = ["work", "--store", f"{ROOT}/store", "--address", surroundings.head, "--until"]
    kinds: list[str] = []
    drivers: list[subprocess.Popen[bytes]] = []
    try:
        with httpx.Client(base_url=service, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE) as client:
            assert client.get("/readyz").json() == {"status": "ok"}
            made = client.post("/v1/jobs", json=manifest)
            assert made.status_code == (201 if page is None else 200), made.text
            id = made.json()["id"]
            assert page is None or page.url == f"{service}/jobs/{id}"
            drivers.append(started(*work, id, log=tmp_path / "first.log"))
            with client.stream("GET", f"/v1/jobs/{id}/events") as events:
                for line in events.iter_lines():
                    kinds += [line.removeprefix("event: ")] if line.startswith("event: ") else []
                    if kinds[-1:] == ["block_done"] and len(drivers) == 1:
                        os.killpg(drivers[0].pid, signal.SIGKILL)
                        drivers.append(started(*work, id, log=tmp_path / "second.log"))
            facts = client.get(f"/v1/jobs/{id}").json()
            assert "event: line" in client.get(f"/v1/jobs/{id}/logs").text
        assert drivers[1].wait(PATIENCE) == 0, (tmp_path / "second.log").read_text()
    finally:
        for driver in drivers:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    assert kinds[0] == "state"
    assert {"job_started", "planned", "block_done", "artifact_published"} <= set(kinds)
    assert kinds[-1] == "end"
    assert (facts["state"], facts["attempts"], facts["failures"]) == ("succeeded", 2, {"lapsed": 1})

    monkeypatch.setenv("COUNTERWEIGHT_TOKEN", TOKEN)
    pulled = tmp_path / "pulled"
    place = f"{service}/v1/artifacts/tiny/latest"
    if page is not None:
        # The page loads itself again and again until the job is at its end.
        page.locator("dd.state", has_text="succeeded").wait_for(timeout=1000 * PATIENCE)
        commands = page.locator("section[aria-labelledby=artifact] pre").inner_text()
        (place,) = re.findall(rf"pull ({service}\S+) tiny", commands)
    assert main(["pull", place, str(pulled)]) == 0
    assert verify(pulled.as_uri()).id == facts["artifact"].rpartition("/")[2]
    model = AutoModelForCausalLM.from_pretrained(pulled)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
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
