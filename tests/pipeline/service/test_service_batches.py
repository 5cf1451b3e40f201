"""Batches, schedules and artifacts over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact.document import ArtifactDocument, FileEntry
from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.schedule import Schedules
from counterweight.pipeline.jobs.states import Cause
from counterweight.pipeline.service.app import fire_schedules
from counterweight.pipeline.service.artifacts import span
from counterweight.pipeline.service.problems import Refused
from tests.pipeline.jobs.memory import MemoryStore
from tests.pipeline.service.house import YAML, House, bundle, document

NIGHTLY = {"schedule": "0 2 * * *", "timeZone": "Europe/Zurich"}
ID = "0123456789abcdef"
ETC = "tiny-output-uri-file-etc.spec.output.uri"


@pytest.fixture
def house() -> House:
    return House()


def end(house: House, id: str, **ended: Any) -> None:
    lease = take(house.jobs, id, "driver")
    assert lease is not None
    assert lease.end(Ended(**{"cause": Cause.DONE, "exit_code": 0, **ended}))


def test_a_batch_comes_with_its_manifests(house: House) -> None:
    first = house.post("/v1/batches?priority=3", bundle())
    assert first.status_code == 201
    id = first.json()["id"]
    assert house.post("/v1/batches", bundle()).status_code == 200
    told = house.get(f"/v1/batches/{id}").json()
    assert [job["name"] for job in told["jobs"]] == ["tiny-calibration-seed-1", "tiny-calibration-seed-2"]
    assert {(job["tenant"], job["priority"], job["batch"]) for job in told["jobs"]} == {("red", 3, id)}
    assert [batch["id"] for batch in house.get("/v1/batches").json()["batches"]] == [id]
    assert len(house.jobs.all()) == 2


def test_a_further_batch_has_jobs_of_its_own(house: House) -> None:
    key = {"Idempotency-Key": "k"}
    asked = [house.post("/v1/batches?again=true", bundle(), headers=headers).json() for headers in (key, key, {}, {})]
    ids = [answer["id"] for answer in asked]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    assert len(house.jobs.all()) == 6


def _seeds(asked: Any, count: int) -> None:
    asked["batch"]["spec"]["matrix"] = {"spec.calibration.seed": list(range(count))}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda asked: asked.pop("manifests"), "manifest"),
        (lambda asked: asked["batch"]["spec"].update(jobs=["s3://bucket/allowed/job.yaml"]), "spec.jobs.0"),
        (lambda asked: asked["batch"]["spec"].update(jobs=["/etc/passwd"]), "spec.jobs.0"),
        (lambda asked: asked["batch"]["spec"].update(matrix={"spec.output.uri": ["file:/etc"]}), ETC),
        (lambda asked: asked["batch"]["spec"].update(schedule="0 2 * * *"), "batch.spec.schedule"),
        (lambda asked: asked["batch"]["spec"].update(concurrency=0), "spec.concurrency"),
        (lambda asked: asked["manifests"].update({"tiny.yaml": []}), "spec.jobs.0"),
        (lambda asked: (asked["manifests"].update(x="x" * 9000), _seeds(asked, 1000)), "batch.spec"),
    ],
)
def test_a_wrong_batch_leaves_nothing(house: House, change: Any, field: str) -> None:
    asked = bundle()
    change(asked)
    answer = house.post("/v1/batches", asked)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field, answer.text
    assert house.keys() == []


def test_a_batch_is_its_tenants(house: House) -> None:
    id = house.post("/v1/batches", bundle()).json()["id"]
    for path in ("", "/report"):
        assert house.get(f"/v1/batches/{id}{path}", "other").status_code == 404
    assert house.post(f"/v1/batches/{id}/cancel", who="other").status_code == 404
    assert house.get("/v1/batches", "other").json() == {"batches": []}
    assert house.post("/v1/batches", bundle("another"), "other").status_code == 409
    assert house.post("/v1/batches?again=true", bundle(), "other").status_code == 201
    assert house.post(f"/v1/batches/{id}/cancel").json()["counts"] == {"cancelled": 2}


def test_a_report_opens_artifacts_below_the_roots_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    report = {"compensated": {"perplexity": 8.0, "kl": 0.1}, "bits_per_weight": {"total": 4.5}}
    for folder in (inside, outside):
        (folder / "report").mkdir(parents=True)
        (folder / "report" / "report.json").write_text(json.dumps(report))
    house = House(roots=("file:/allowed", inside.as_uri()))
    id = house.post("/v1/batches", bundle()).json()["id"]
    for job, folder in zip(house.get(f"/v1/batches/{id}").json()["jobs"], (inside, outside), strict=True):
        end(house, job["id"], artifact=folder.as_uri())
    told = house.get(f"/v1/batches/{id}/report").json()
    assert [point["bits"] for point in told["points"]] == [4.5, None]
    assert told["perplexity_front"] == [told["points"][0]["job"]]


def test_schedules_are_listed_with_their_next_firings(house: House) -> None:
    first = house.post("/v1/schedules", bundle(**NIGHTLY))
    assert first.status_code == 201
    assert house.post("/v1/schedules", bundle(**NIGHTLY)).status_code == 200
    id = first.json()["id"]
    (told,) = house.get("/v1/schedules").json()["schedules"]
    assert told["next"][0] == "2026-01-01T01:00:00+00:00"
    assert house.get("/v1/schedules", "other").json() == {"schedules": []}
    assert house.get(f"/v1/schedules/{id}", "other").status_code == 404
    assert house.post(f"/v1/schedules/{id}/stop", who="other").status_code == 404
    assert house.post("/v1/schedules", bundle(**NIGHTLY), "other").status_code == 409
    assert house.post(f"/v1/schedules/{id}/stop").json()["state"] == "stopped"
    assert house.get(f"/v1/schedules/{id}").json()["next"] == []
    assert house.post("/v1/schedules", bundle()).status_code == 422


def test_the_service_fires_schedules_beside_others() -> None:
    store = MemoryStore()
    looks: list[float] = []

    async def pause(seconds: float) -> None:
        looks.append(seconds)
        store.advance(1800)
        Schedules(house.jobs).tick()  # another instance
        if len(looks) == 60:
            raise asyncio.CancelledError

    house = House(store, pause=pause)
    house.post("/v1/schedules", bundle(**NIGHTLY))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(fire_schedules(house.service))
    (told,) = house.get("/v1/schedules").json()["schedules"]
    assert told["fired"] == {"2026-01-01T01:00:00+00:00": "started", "2026-01-02T01:00:00+00:00": "skipped"}
    assert len(house.jobs.all()) == 2


FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "ledger.json": b"{}",
    "report/report.json": b"{}",
    "data/part 1.bin": bytes(range(256)) * 40,
}


def artifact(root: Path, id: str = ID, files: Mapping[str, bytes] = FILES) -> str:
    """An artifact as the service sees one; its URI."""
    folder = root / "tiny" / id
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    entries = {path: FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in files.items()}
    made = ArtifactDocument.model_validate(
        {
            "name": "tiny",
            "id": id,
            "created": "2026-01-01T00:00:00Z",
            "base_model": {"uri": "m", "digest": "d", "model_type": "llama", "parameters": 1},
            "recipe": {},
            "ledger": {"quantized": 1, "kept": 0, "dropped": 0},
            "baseline": None,
            "quantized": None,
            "compensated": None,
            "bits_per_weight": {"weights": 4, "scales": 0, "factors": 0, "residual": 0, "total": 4, "model": 5},
            "software": {},
            "files": {path: entry.model_dump() for path, entry in entries.items()},
        }
    )
    (folder / "artifact.json").write_text(made.model_dump_json())
    (folder / "secret.txt").write_text("none of its files")
    return folder.as_uri()


@pytest.fixture
def published(tmp_path: Path) -> House:
    """Where a job of red has published."""
    house = House(roots=("file:/allowed", tmp_path.as_uri()))
    end(house, house.submit()["id"], artifact=artifact(tmp_path))
    return house


def test_an_artifact_is_given_file_by_file(published: House) -> None:
    place = f"/v1/artifacts/tiny/{ID}"
    assert published.get(place).json()["files"]["config.json"]["size"] == 2
    told = published.get(f"{place}/urls").json()
    assert set(told["files"]) == {*FILES, "artifact.json"}
    for path, url in told["files"].items():
        answer = published.get(url["url"], "viewer")
        assert url["token"]
        assert (answer.status_code, len(answer.content)) == (200, url["size"])
        assert path == "artifact.json" or hashlib.sha256(answer.content).hexdigest() == url["sha256"]
    assert published.get("/v1/artifacts/tiny/latest").json()["id"] == ID


def test_a_file_is_given_in_ranges(published: House) -> None:
    url, whole = f"/v1/artifacts/tiny/{ID}/files/data/part%201.bin", FILES["data/part 1.bin"]
    for asked, start, stop in (("0-9", 0, 10), ("10000-", 10000, 10240), ("-5", 10235, 10240), ("5-99999", 5, 10240)):
        answer = published.get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, whole[start:stop])
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/10240"
    tag = published.get(url).headers["etag"]
    assert published.get(url, headers={"Range": "bytes=0-9", "If-Range": tag}).status_code == 206
    assert published.get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'}).content == whole
    assert published.get(url, headers={"Range": "bytes=10240-"}).status_code == 416


@pytest.mark.parametrize("header", [None, "bytes=", "bytes=-", "bytes=5-2", "bytes=0-1,3-4", "lines=0-1", "bytes=0x-1"])
def test_a_range_that_is_none_is_left_aside(header: str | None) -> None:
    assert span(header, 10) is None


def test_an_empty_file_has_no_range() -> None:
    for header in ("bytes=0-", "bytes=-0", "bytes=-1"):
        with pytest.raises(Refused):
            span(header, 0)


def test_an_artifact_is_its_tenants_and_below_the_roots(published: House, tmp_path: Path) -> None:
    assert published.get(f"/v1/artifacts/tiny/{ID}", "other").status_code == 404
    assert published.get(f"/v1/artifacts/tiny/{ID}/files/secret.txt").status_code == 404
    assert published.get(f"/v1/artifacts/tiny/{'0' * 16}").status_code == 404
    closed = House(published.store, roots=("file:/allowed",))
    assert closed.get(f"/v1/artifacts/tiny/{ID}").status_code == 404
    (tmp_path / "tiny" / ID / "artifact.json").unlink()
    assert published.get(f"/v1/artifacts/tiny/{ID}").status_code == 404


def test_latest_is_what_was_published_last(tmp_path: Path) -> None:
    store = MemoryStore()
    house = House(store, roots=("file:/allowed", tmp_path.as_uri()))
    for id in ("f" * 16, "1" * 16):
        store.advance(60)
        end(house, house.submit(query="?again=true")["id"], artifact=artifact(tmp_path, id))
    assert house.get("/v1/artifacts/tiny/latest").json()["id"] == "1" * 16


def test_yaml_bundles_are_read_too(house: House) -> None:
    asked = json.dumps(bundle())  # YAML has JSON in it
    assert house.ask("POST", "/v1/batches", content=asked, headers=YAML).status_code == 201
    assert document()["kind"] == "CompressionJob"


def test_a_report_is_shown_in_a_sandbox(tmp_path: Path) -> None:
    page = b"<!DOCTYPE html><script>alert(1)</script>"
    files = {**FILES, "report/report.html": page}
    house = House(roots=("file:/allowed", tmp_path.as_uri()))
    end(house, house.submit()["id"], artifact=artifact(tmp_path, files=files))
    answer = house.ask("GET", f"/artifacts/tiny/{ID}/report", None, cookies={"counterweight_token": "viewer-token"})
    assert (answer.status_code, answer.content) == (200, page)
    assert {"default-src 'none'", "sandbox"} <= set(answer.headers["content-security-policy"].split("; "))
    other = {"counterweight_token": "other-token"}
    assert house.ask("GET", f"/artifacts/tiny/{ID}/report", None, cookies=other).status_code == 404
