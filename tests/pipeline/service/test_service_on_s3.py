"""Jobs and artifacts in a server that speaks S3: files are fetched from it, with URLs that the service signs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from counterweight.pipeline.jobs.journal import Ended
from counterweight.pipeline.jobs.lease import take
from counterweight.pipeline.jobs.states import Cause
from counterweight.workers.storage import open_store
from tests.pipeline.service.house import House
from tests.pipeline.service.test_service_batches import FILES, ID, artifact
from tests.servers import S3Server, moto_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with moto_server() as running:
        yield running.with_bucket("jobs")


def test_files_have_presigned_urls(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    artifact(tmp_path)
    out = open_store("s3://jobs/out")
    for path in (tmp_path / "tiny" / ID).rglob("*"):
        if path.is_file():
            out.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    house = House(open_store("s3://jobs/store"), roots=("file:/allowed", "s3://jobs/out"))
    lease = take(house.jobs, house.submit()["id"], "driver")
    assert lease is not None
    assert lease.end(Ended(cause=Cause.DONE, exit_code=0, artifact=f"s3://jobs/out/tiny/{ID}"))

    place = f"/v1/artifacts/tiny/{ID}"
    told = house.get(f"{place}/urls?seconds=60").json()
    for path, data in FILES.items():
        url = told["files"][path]["url"]
        assert not told["files"][path]["token"]
        assert "X-Amz-Expires=60" in url or "Expires=" in url
        assert httpx.get(url).content == data
    bare = urlsplit(told["files"]["config.json"]["url"])._replace(query="").geturl()
    assert bare.endswith(f"/jobs/out/tiny/{ID}/config.json")
    redirect = house.get(f"{place}/files/config.json")
    assert redirect.status_code == 307
    assert httpx.get(redirect.headers["location"]).content == b"{}"
