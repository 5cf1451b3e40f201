"""`counterweight push` through the real client of the hub, to a hub of our own on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from counterweight.pipeline.artifact import verify
from counterweight.pipeline.artifact.hub import push
from counterweight.workers.errors import IntegrityError, RequestError
from tests.inprocess import local, run_job
from tests.models import checkpoint

NAME = "owner/tiny-w4"


@dataclass
class Hub:
    """What was made and committed. requests: method and path, in order."""

    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The endpoint of a hub that takes commits and gives nothing back."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"POST {self.path}")
            if self.path == "/api/repos/create":
                hub.made.append(json.loads(body))
                if hub.made[-1].get("organization") == "forbidden":
                    self._send({"error": "no rights"}, 403)
                    return
                self._send({"url": f"{endpoint}/{NAME}"})
            elif self.path == "/api/validate-yaml":
                assert json.loads(body)["content"].startswith("---\nlibrary_name: transformers\n")
                self._send({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                files = [
                    {"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False} for one in asked
                ]
                self._send({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                asked = json.loads(body)["objects"]
                objects = [{**one, "actions": {"upload": {"href": f"{endpoint}/upload/{one['oid']}"}}} for one in asked]
                self._send({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                hub.commit([json.loads(line) for line in body.splitlines()])
                self._send({"commitUrl": f"{endpoint}/{NAME}/commit/1", "commitOid": "1" * 40, "success": True})
            else:
                self._send({}, 404)

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            oid = self.path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            self._send({})

        def do_GET(self) -> None:
            hub.requests.append(f"GET {self.path}")
            self._send({}, 404)

        def _send(self, content: Any, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    def _mode(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push")
    checkpoint("llama", place / "model", torch.bfloat16)
    (place / "model" / "LICENSE").write_text("a licence")
    recipe = {"weights": {"bits": 4, "group_size": 32}, "compensation": {"kind": "svd", "rank": {"energy": 0.5}}}
    return local(run_job(place / "model", place / "out", recipe, validation={}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    with serving(made) as endpoint:
        for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.constants.ENDPOINT"):
            monkeypatch.setattr(name, endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "a-token")
        yield made


def test_what_lies_there_is_the_artifact_under_its_new_name(artifact: Path, hub: Hub, tmp_path: Path) -> None:
    told: list[str] = []
    url = push(artifact.as_uri(), f"hf:{NAME}", private=True, done=lambda path, size: told.append(path))
    assert url.endswith(NAME)
    assert hub.made[0]["name"] == "tiny-w4"
    assert hub.made[0]["organization"] == "owner"
    assert len(hub.commits) == 1
    there = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    assert set(hub.files) == there == {*told, "artifact.json"}
    for name, data in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert verify(tmp_path.as_uri()).id == json.loads((artifact / "artifact.json").read_bytes())["id"]
    changed = {name for name in there if (artifact / name).read_bytes() != hub.files[name]}
    assert changed == {"artifact.json", "README.md", "compensation/adapter_config.json"}
    card = hub.files["README.md"].decode()
    assert f'load_model("hf:{NAME}")' in card
    assert "file:///path" not in card


def test_the_adapter_belongs_to_the_repository_and_asks_for_its_largest_rank(artifact: Path, hub: Hub) -> None:
    push(artifact.as_uri(), f"hf:{NAME}")
    config = json.loads(hub.files["compensation/adapter_config.json"])
    assert config["base_model_name_or_path"] == NAME
    assert config["r"] == config["lora_alpha"] == max(config["rank_pattern"].values())
    assert len(set(config["rank_pattern"].values())) > 1


def test_a_damaged_artifact_is_not_uploaded(artifact: Path, hub: Hub, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match=re.escape(shard.name)):
        push(copy.as_uri(), f"hf:{NAME}")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repository", "said"),
    [("s3://bucket/x", "expected hf:owner/name"), ("hf:forbidden/x", "403"), ("hf:a//b", "repository: hf:a//b")],
)
def test_what_is_refused_is_said(repository: str, said: str, artifact: Path, hub: Hub) -> None:
    with pytest.raises(RequestError, match=said):
        push(artifact.as_uri(), repository)
    assert hub.files == {}
