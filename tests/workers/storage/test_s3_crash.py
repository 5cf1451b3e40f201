"""The S3 server dies in the middle of everything and comes back."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path

import boto3
import pytest

from counterweight.workers.errors import StorageError
from counterweight.workers.storage import sha256_hex
from counterweight.workers.storage.s3 import S3Store
from counterweight.workers.storage.s3_client import S3Settings
from tests.servers import Connect, S3Server, kill_ceph, start_ceph

MIB = 1 << 20


def acknowledged_parts(uri: str) -> int:
    client = boto3.session.Session().client("s3")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", ())
    places = [{"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]} for upload in uploads]
    return sum(len(client.list_parts(**place).get("Parts", ())) for place in places)


@pytest.mark.integration
def test_what_was_acknowledged_survives_a_crash_of_the_server(
    ceph: S3Server, ceph_directory: Path, connect: Connect
) -> None:
    uri = connect(ceph)
    store = S3Store(uri, S3Settings(part_size=5 * MIB, total_max_attempts=2))
    objects = {f"small/{number}": random.Random(number).randbytes(1000) for number in range(20)}
    objects["big"] = random.Random(99).randbytes(6 * MIB)
    for key, data in objects.items():
        store.write(key, data)
    assert store.create("once", b"first")
    continued, abandoned = store.open_writer("continued"), store.open_writer("abandoned")
    for writer in (continued, abandoned):
        writer.write(objects["big"])
    while acknowledged_parts(uri) < 2:  # parts are sent in the background
        time.sleep(0.05)

    kill_ceph(ceph_directory)
    for use in (lambda: store.read("big"), lambda: store.create("other", b""), lambda: store.exists("big")):
        with pytest.raises(StorageError, match=r"s3://.*: EndpointConnectionError"):
            use()
    assert start_ceph(ceph_directory) == ceph
    assert start_ceph(ceph_directory) == ceph  # again: everything runs already

    for key, data in objects.items():
        assert store.read(key, sha256=sha256_hex(data)) == data
    assert not store.create("once", b"second")
    continued.write(b"the rest")
    written = continued.commit()
    assert store.read("continued", sha256=written.sha256) == objects["big"] + b"the rest"
    assert store.abort_stale_writes(timedelta(seconds=-60)) == 1
    assert sorted([*objects, "once", "continued"]) == [item.key for item in store.list()]
