"""Artifacts pulled from a service by whoever has its token alone, and the tags that they are pulled by."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn

from counterweight.pipeline.artifact import pull, remote
from counterweight.pipeline.artifact.remote import RemoteArtifact
from counterweight.pipeline.artifact.tags import MovedError, move, put, tagged, tags
from counterweight.pipeline.artifact.transfer import DOCUMENT
from counterweight.pipeline.cli import main
from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.states import Cause
from counterweight.pipeline.prune import prune
from counterweight.pipeline.units import duration
from counterweight.workers.errors import CheckpointError, IntegrityError, RequestError, StorageError
from counterweight.workers.storage import fetch, open_store
from counterweight.workers.storage.file import FileStore
from tests.patience import PATIENCE
from tests.pipeline.service.house import House
from tests.pipeline.service.test_service_batches import ID, artifact
from tests.servers import moto_server

FETCH = sys.modules[fetch.__module__]
OTHER = "fedcba9876543210"
BIG = bytes(range(256)) * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "ledger.json": b"{}",
    "report/report.json": b"{}",
    "model-00001-of-00001.safetensors": BIG,
}


@contextmanager
def served(house: House) -> Iterator[str]:
    """The URL of a house's application on a real socket."""
    server = uvicorn.Server(uvicorn.Config(house.app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def publishing(house: House, uri: str, name: str = "tiny") -> None:
    lease = take(house.jobs, house.submit(name)["id"], "driver")
    assert lease is not None
    assert lease.end(Ended(cause=Cause.DONE, exit_code=0, artifact=uri))


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Where red has published two artifacts of one name; the second one is the latest."""
    house = House(roots=("file:/allowed", tmp_path.as_uri()))
    publishing(house, artifact(tmp_path, ID, FILES))
    house.store.advance(1)  # type: ignore[attr-defined]
    publishing(house, artifact(tmp_path, OTHER, FILES), "other")
    return house


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.TOKEN, "viewer-token")


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("token")
class TestAPull:
    def test_by_id_latest_and_tag_is_the_artifact(
        self, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(FETCH, "PART", 1000)  # many ranges
        assert house.ask("PUT", f"/v1/artifacts/tiny/tags/good?id={ID}").status_code == 200
        wanted = {ID: ID, "latest": OTHER, "good": ID}
        with served(house) as url:
            for name, id in wanted.items():
                assert main(["pull", f"{url}/v1/artifacts/tiny/{name}", str(tmp_path / name)]) == 0, capsys.readouterr()
                original = content(tmp_path / "tiny" / id)
                del original["secret.txt"]
                assert content(tmp_path / name) == original

    def test_goes_on_where_another_one_stopped(
        self, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FETCH, "PART", 1000)
        read: list[tuple[str, int, int]] = []
        whole = RemoteArtifact.read_range

        def counted(self: RemoteArtifact, key: str, start: int, length: int) -> bytes:
            read.append((key, start, length))
            return whole(self, key, start, length)

        monkeypatch.setattr(RemoteArtifact, "read_range", counted)
        (tmp_path / "out").mkdir()
        model = "model-00001-of-00001.safetensors"
        (tmp_path / "out" / f"{model}.partial").write_bytes(BIG[:5500])
        with served(house) as url:
            pull(f"{url}/v1/artifacts/tiny/{ID}", tmp_path / "out")
            assert (tmp_path / "out" / model).read_bytes() == BIG
            assert sorted(start for key, start, _ in read if key == model) == list(range(5500, len(BIG), 1000))
            read.clear()
            pull(f"{url}/v1/artifacts/tiny/{ID}", tmp_path / "out")
            assert {key for key, _, _ in read} == {DOCUMENT}

    def test_of_bytes_that_are_not_the_artifacts_is_refused(self, house: House, tmp_path: Path) -> None:
        (tmp_path / "tiny" / ID / "ledger.json").write_bytes(b"[]")
        with served(house) as url, pytest.raises(IntegrityError, match=r"ledger\.json"):
            pull(f"{url}/v1/artifacts/tiny/{ID}", tmp_path / "out")
        assert not (tmp_path / "out" / DOCUMENT).exists()

    def test_from_s3_goes_to_its_store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with moto_server() as server:
            server = server.with_bucket("jobs")
            for name, value in server.environment().items():
                monkeypatch.setenv(name, value)
            artifact(tmp_path, ID, FILES)
            out = open_store("s3://jobs/out")
            for path, data in content(tmp_path / "tiny").items():
                out.write(f"tiny/{path}", data)
            house = House(FileStore(tmp_path / "store"), roots=("file:/allowed", "s3://jobs/out"))
            publishing(house, f"s3://jobs/out/tiny/{ID}")
            with served(house) as url:
                pull(f"{url}/v1/artifacts/tiny/latest", tmp_path / "pulled")
        original = content(tmp_path / "tiny" / ID)
        del original["secret.txt"]
        assert content(tmp_path / "pulled") == original

    def test_without_a_token_says_what_is_missing(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(remote.TOKEN)
        with served(house) as url:
            with pytest.raises(RequestError, match="expected COUNTERWEIGHT_TOKEN"):
                RemoteArtifact(f"{url}/v1/artifacts/tiny/{ID}")
            with pytest.raises(RequestError, match="expected a published artifact"):
                RemoteArtifact(f"{url}/v1/artifacts/tiny/{'0' * 16}", "viewer-token")


@dataclass
class Answers:
    """A server with answers of its own: (status, headers, body) by path, the first of several first. asked: what it was asked,
    with the Authorization header."""

    script: dict[str, list[tuple[int, dict[str, str], bytes]]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def answers() -> Iterator[tuple[str, Answers]]:
    told = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.asked.append((self.path, self.headers.get("Authorization")))
            script = told.script.get(self.path) or [(404, {}, b"")]
            status, headers, body = script.pop(0) if len(script) > 1 else script[0]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", told
    server.shutdown()
    server.server_close()
    thread.join()


def urls(place: str, *, token: bool, size: int = 2) -> bytes:
    told = '{"name": "tiny", "id": "%s", "expires_in": 60, "files": {"artifact.json": %s}}'
    file = f'{{"url": "{place}", "token": {str(token).lower()}, "size": {size}, "sha256": null}}'
    return (told % (ID, file)).encode()


@pytest.mark.usefixtures("token")
class TestAServiceThat:
    BASE = f"/v1/artifacts/tiny/{ID}"

    @pytest.fixture(autouse=True)
    def _at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        monkeypatch.setattr(remote.time, "sleep", self.pauses.append)

    def opened(self, url: str) -> RemoteArtifact:
        return RemoteArtifact(f"{url}{self.BASE}")

    def test_sends_elsewhere_is_not_followed_with_the_token(self, answers: tuple[str, Answers]) -> None:
        url, told = answers
        told.script[f"{self.BASE}/urls"] = [(302, {"Location": f"{url}/thief"}, b"")]
        with pytest.raises(StorageError, match="302"):
            self.opened(url)
        assert [path for path, _ in told.asked] == [f"{self.BASE}/urls"]

    def test_names_a_file_of_this_machine_is_refused(self, answers: tuple[str, Answers], tmp_path: Path) -> None:
        url, told = answers
        (tmp_path / "a").write_text("{}")
        told.script[f"{self.BASE}/urls"] = [(200, {}, urls((tmp_path / "a").as_uri(), token=False))]
        with pytest.raises(RequestError, match="expected http"):
            self.opened(url)

    def test_is_busy_is_asked_again_when_it_says(self, answers: tuple[str, Answers]) -> None:
        url, told = answers
        busy = [(503, {"Retry-After": "7"}, b""), (429, {}, b"")]
        told.script[f"{self.BASE}/urls"] = [*busy, (200, {}, b"[]")]
        with pytest.raises(RequestError, match="no artifact of a service"):
            self.opened(url)
        assert self.pauses == [7.0, 2.0]
        told.script[f"{self.BASE}/urls"] = [(500, {}, b"")]
        with pytest.raises(StorageError, match="500 Internal Server Error, 5 times"):
            self.opened(url)

    def test_signs_for_too_short_a_time_is_asked_for_new_urls(self, answers: tuple[str, Answers]) -> None:
        url, told = answers
        ranged = {"Content-Range": "bytes 0-1/2"}
        told.script |= {
            f"{self.BASE}/urls": [
                (200, {}, urls(f"{url}/old?X-Amz-Signature=s", token=False)),
                (200, {}, urls(f"{url}/new?X-Amz-Signature=s", token=False)),
            ],
            "/old?X-Amz-Signature=s": [(403, {}, b"")],
            "/new?X-Amz-Signature=s": [(206, ranged, b"{}")],
        }
        with pytest.raises(CheckpointError, match="not an artifact's"):
            self.opened(url)
        assert [(path.partition("?")[0], who) for path, who in told.asked] == [
            (f"{self.BASE}/urls", "Bearer viewer-token"),
            ("/old", None),
            (f"{self.BASE}/urls", "Bearer viewer-token"),
            ("/new", None),
        ]

    @pytest.mark.parametrize(
        ("headers", "body", "why"),
        [
            ({}, b"{}", "ignored the range"),
            ({"Content-Range": "bytes 0-1/2"}, b"{}{}", "more than the 2 bytes"),
            ({"Content-Range": "bytes 0-1/2"}, b"{", "IncompleteRead"),
        ],
    )
    def test_sends_something_else_is_no_store(
        self, answers: tuple[str, Answers], headers: dict[str, str], body: bytes, why: str
    ) -> None:
        url, told = answers
        told.script |= {
            f"{self.BASE}/urls": [(200, {}, urls("/file", token=True))],
            "/file": [(206, headers, body)],
        }
        with pytest.raises(StorageError, match=why):
            self.opened(url)


class TestTags:
    def test_are_moved_by_whoever_has_seen_where_they_are(self, tmp_path: Path) -> None:
        store = FileStore(tmp_path)
        assert tagged(store, "good") is None
        assert move(store, "good", ID, before=None)
        with pytest.raises(MovedError, match=f"is on {ID}: expected nothing"):
            move(store, "good", OTHER, before=None)
        with pytest.raises(MovedError, match=f"is on {ID}: expected {OTHER}"):
            move(store, "good", None, before=OTHER)
        assert not move(store, "good", ID, before=ID)
        assert move(store, "good", OTHER, before=ID)
        assert put(store, "best", ID)
        assert tags(store) == {"best": ID, "good": OTHER}
        assert put(store, "good", None)
        assert tags(store) == {"best": ID}
        assert move(store, "good", ID, before=None)

    def test_moved_by_two_at_once_are_moved_by_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = FileStore(tmp_path)
        assert move(store, "good", ID, before=None)
        create = FileStore.create

        def late(self: FileStore, key: str, data: bytes) -> bool:
            monkeypatch.setattr(FileStore, "create", create)
            assert move(store, "good", OTHER, before=ID)  # somebody else, between our look and our create
            return create(self, key, data)

        monkeypatch.setattr(FileStore, "create", late)
        with pytest.raises(MovedError, match="was moved meanwhile"):
            move(store, "good", None, before=ID)
        assert tagged(store, "good") == OTHER

    @pytest.mark.parametrize("tag", ["latest", "tags", ID, "", "Good", "-a", "a/b", "a" * 64, "é"])
    def test_that_are_none_are_refused(self, tmp_path: Path, tag: str) -> None:
        with pytest.raises(RequestError, match="expected a letter"):
            move(FileStore(tmp_path), tag, ID, before=None)

    def test_of_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first, second = (artifact(tmp_path / "out", id, FILES) for id in (ID, OTHER))

        def run(*arguments: str) -> tuple[int, str]:
            code = main(["tag", *arguments])
            captured = capsys.readouterr()
            return code, captured.out + captured.err

        assert run(first, "good")[0] == 0
        assert run(second, "good", "--expect", "none") == (2, f"error: tag good: is on {ID}: expected nothing\n")
        assert run(second, "good", "--expect", ID)[0] == 0
        name = (tmp_path / "out" / "tiny").as_uri()
        assert f'"good": "{OTHER}"' in run(f"{name}@good", "--json")[1]
        assert main(["pull", f"{name}@good", str(tmp_path / "pulled")]) == 0
        assert content(tmp_path / "pulled")["artifact.json"] == content(tmp_path / "out/tiny" / OTHER)["artifact.json"]
        assert "no such tag: expected one of good" in run(f"{name}@bad")[1]
        assert run(first, "--delete")[0] == 2
        pruned = prune((tmp_path / "out").as_uri(), duration("0", "age"))
        assert "tags/good" not in " ".join(pruned.left)
        assert run(first, "good", "--delete")[0] == 0
        assert "none" in run(first)[1]

    def test_over_http(self, house: House) -> None:
        place = "/v1/artifacts/tiny/tags"
        assert house.get(place).json() == {"name": "tiny", "tags": {}}
        assert house.ask("PUT", f"{place}/good?id={ID}", "viewer").status_code == 403
        made = house.ask("PUT", f"{place}/good?id={ID}", headers={"If-None-Match": "*"})
        assert made.json()["tags"] == {"good": ID}
        assert house.ask("PUT", f"{place}/good?id={OTHER}", headers={"If-None-Match": "*"}).status_code == 412
        assert house.ask("PUT", f"{place}/good?id={OTHER}", headers={"If-Match": f'"{OTHER}"'}).status_code == 412
        moved = house.ask("PUT", f"{place}/good?id={OTHER}", headers={"If-Match": f'"{ID}"'})
        assert moved.json()["tags"] == {"good": OTHER}
        assert house.get("/v1/artifacts/tiny/good").json()["id"] == OTHER
        assert house.ask("PUT", f"{place}/latest?id={ID}").status_code == 422
        assert house.ask("PUT", f"{place}/good?id={'0' * 16}").status_code == 404
        for who in ("other", "viewer"):
            assert house.ask("DELETE", f"{place}/good", who).status_code in (403, 404)
        assert house.get(place, "other").status_code == 404
        assert house.ask("DELETE", f"{place}/good").json()["tags"] == {}
        assert house.get("/v1/artifacts/tiny/good").status_code == 404
