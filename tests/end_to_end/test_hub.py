"""`hf:` through the real client of the hub, against a hub of our own on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.models import checkpoint, write_text
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
PATIENT = {f"HF_HUB_{what}_TIMEOUT": str(int(PATIENCE)) for what in ("ETAG", "DOWNLOAD")}
"""The hub here is on this machine, which may be busy; the client would wait for ten seconds."""
NAME, COMMIT = "owner/tiny", "1" * 40


@contextmanager
def hub(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves `directory` as the repository NAME; yields the endpoint and the files that were asked for, in order."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            prefix = f"/{NAME}/resolve/{COMMIT}/"
            if path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
                self._send(json.dumps({"id": NAME, "sha": COMMIT}).encode(), body=body)
            elif path == f"/api/models/{NAME}/tree/{COMMIT}":
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                    for file in sorted(directory.iterdir())
                ]
                self._send(json.dumps(files).encode(), body=body)
            elif path.startswith(prefix):
                name = path.removeprefix(prefix)
                if body:
                    asked.append(name)
                self._send((directory / name).read_bytes(), body=body)
            elif path.startswith("/api/models/owner/other"):
                self._send(b"{}", body=body, status=404, error="RepoNotFound")
            elif path.startswith(f"/api/models/{NAME}/revision/"):
                self._send(b"{}", body=body, status=404, error="RevisionNotFound")
            else:
                self._send(b"{}", body=body, status=503)

        def _send(self, content: bytes, *, body: bool, status: int = 200, error: str | None = None) -> None:
            self.send_response(status)
            if error is not None:
                self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def plan(tmp_path: Path, endpoint: str, model: str = f"hf:{NAME}") -> subprocess.CompletedProcess[str]:
    """`counterweight plan` of a job on `model`, with a cache of its own."""
    text = write_text(tmp_path / "text.txt", 2_000).as_uri()
    spec = {
        "model": {"uri": model},
        "calibration": {"source": {"uri": text}, "sequences": 2, "sequence_length": 16},
        "recipe": {"weights": {"bits": 4, "quantizer": {"kind": "rtn"}}},
        "output": {"uri": (tmp_path / "artifacts").as_uri()},
    }
    document = {"apiVersion": "counterweight/v1", "kind": "CompressionJob", "metadata": {"name": "hub"}, "spec": spec}
    manifest = tmp_path / "job.json"
    manifest.write_text(json.dumps(document))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "counterweight.pipeline.cli", "plan", str(manifest), "--json"],
        cwd=ROOT,
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), **PATIENT},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_a_repository_of_the_hub_is_downloaded_and_its_code_and_pickles_are_not(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    checkpoint("llama", directory, torch.bfloat16)
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    (directory / "modeling_tiny.py").write_text("raise SystemExit('remote code')")
    with hub(directory) as (endpoint, asked):
        first = plan(tmp_path, endpoint)
        fetched = list(asked)
        again = plan(tmp_path, endpoint)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["model_type"] == "llama"
    assert "model.safetensors" in fetched
    assert "config.json" in fetched
    assert not [name for name in fetched if name.endswith((".bin", ".py"))]
    assert again.stdout == first.stdout
    assert asked == fetched, "the second run found everything in the cache"


@pytest.mark.parametrize(
    ("model", "code"), [("hf:owner/other", 2), (f"hf:{NAME}@v9", 2), ("hf:owner/unwell", 4)], ids=str
)
def test_what_the_hub_does_not_give_ends_with_one_line(tmp_path: Path, model: str, code: int) -> None:
    (tmp_path / "empty").mkdir()
    with hub(tmp_path / "empty") as (endpoint, _):
        done = plan(tmp_path, endpoint, model)
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: spec.model.uri: {model}: ")
