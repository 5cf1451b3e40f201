"""What is particular to S3: settings, environment, errors, memory. Faults on the wire are in
test_s3_faults."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from pydantic import ValidationError

from counterweight.workers.errors import CounterweightError, RequestError, StorageError
from counterweight.workers.storage import open_store, sha256_hex
from counterweight.workers.storage.s3 import S3Store
from counterweight.workers.storage.s3_client import S3Settings, make_client
from tests.faultproxy import FaultProxy
from tests.servers import Connect, S3Server

MIB = 1 << 20
Proxied = tuple[FaultProxy, Callable[..., S3Store]]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing of AWS is set."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


def url_of(client: Any) -> str:
    return str(client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"}))


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_servers_other_than_aws_are_addressed_by_path(bare: pytest.MonkeyPatch, name: str) -> None:
    bare.setenv(name, "http://storage.internal:9000")
    bare.setenv("AWS_ACCESS_KEY_ID", "id")
    bare.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert url_of(make_client(S3Settings())).startswith("http://storage.internal:9000/bucket/key?")


def test_aws_is_addressed_by_host_in_the_region_of_the_environment(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("AWS_ACCESS_KEY_ID", "id")
    bare.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bare.setenv("AWS_REGION", "eu-central-1")
    client = make_client(S3Settings())
    assert client.meta.region_name == "eu-central-1"
    assert url_of(client).startswith("https://bucket.s3")
    bare.setenv("AWS_DEFAULT_REGION", "eu-west-1")  # boto3's own variable goes first
    assert make_client(S3Settings()).meta.region_name == "eu-west-1"


def test_the_users_profile_is_heeded(bare: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-3\nendpoint_url = http://storage.internal:9000\n"
        "s3 =\n  addressing_style = virtual\n"
        "aws_access_key_id = id\naws_secret_access_key = secret\n"
    )
    bare.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = make_client(S3Settings())
    assert client.meta.region_name == "eu-west-3"
    assert url_of(client).startswith("http://bucket.storage.internal:9000/key?")


def test_a_malformed_environment_is_a_wrong_request(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(RequestError, match=r"127\.0\.0\.1:9000"):
        S3Store("s3://bucket").read("a")
    bare.delenv("AWS_ENDPOINT_URL")
    bare.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(RequestError, match="nobody"):
        S3Store("s3://bucket").read("a")


def test_absent_credentials_are_a_wrong_request(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for use in uses(S3Store("s3://bucket/prefix")):
        with pytest.raises(RequestError, match=r" s3://bucket/prefix.*: NoCredentialsError: "):
            use()


def uses(store: S3Store) -> list[Callable[[], object]]:
    return [
        lambda: store.read("a"),
        lambda: store.read_range("a", 0, 1),
        lambda: list(store.stream("a")),
        lambda: store.size("a"),
        lambda: store.exists("a"),
        lambda: store.write("a", b"x"),
        lambda: store.create("a", b"x"),
        lambda: store.copy("a", "b"),
        lambda: list(store.list()),
        lambda: store.delete("a"),
    ]


def test_nobody_listens(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    bare.setenv("AWS_ACCESS_KEY_ID", "id")
    bare.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for use in uses(S3Store("s3://bucket", S3Settings(total_max_attempts=1))):
        with pytest.raises(StorageError, match=r" s3://bucket.*: EndpointConnectionError: .*127\.0\.0\.1:9/"):
            use()


def test_a_missing_bucket_is_a_wrong_request(moto: S3Server, connect: Connect) -> None:
    connect(moto)
    store = S3Store("s3://no-such-bucket/prefix")
    for use in uses(store):
        with pytest.raises(RequestError, match="404 NoSuchBucket") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.integration
def test_a_missing_bucket_at_a_real_server(ceph: S3Server, connect: Connect) -> None:
    test_a_missing_bucket_is_a_wrong_request(ceph, connect)


@pytest.mark.integration
def test_wrong_keys_are_a_wrong_request(ceph: S3Server, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = connect(ceph)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for use in uses(S3Store(uri)):
        with pytest.raises(RequestError, match=rf" {uri}.*: 403( SignatureDoesNotMatch)?") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_markers_and_odd_names_of_others_are_not_listed(moto: S3Server, connect: Connect) -> None:
    store = S3Store(connect(moto))
    store.write("a/b", b"data")
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    client = boto3.session.Session().client("s3")
    for name in ("a/", "", "a//b", "../c"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"")
    client.put_object(Bucket=bucket, Key=f"{prefix}-sibling/d", Body=b"")
    assert [item.key for item in store.list()] == ["a/b"]


def test_a_bucket_may_be_the_root(moto: S3Server, connect: Connect) -> None:
    deep = S3Store(connect(moto))
    bucket, _, prefix = deep.uri.removeprefix("s3://").partition("/")
    deep.write("a", b"data")
    store = open_store(f"s3://{bucket}/")
    assert store.uri == f"s3://{bucket}"
    assert store.read(f"{prefix}/a") == b"data"
    assert [item.key for item in store.list(f"{prefix}/")] == [f"{prefix}/a"]


def test_settings_reach_the_client() -> None:
    config = make_client(S3Settings(connect_timeout=3, read_timeout=7, connections=11)).meta.config
    assert (config.connect_timeout, config.read_timeout, config.max_pool_connections) == (3, 7, 11)
    assert make_client(S3Settings(total_max_attempts=2)).meta.config.retries["total_max_attempts"] == 2


@pytest.mark.parametrize(
    "wrong",
    [{"part_size": 4 * MIB}, {"read_timeout": 0}, {"page_size": 1001}, {"total_max_attempts": 0}, {"x": 1}],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        S3Settings(**wrong)


@pytest.mark.parametrize(("part_size", "parts"), [(5, 3), (8, 2)])
def test_part_size(proxied: Proxied, part_size: int, parts: int) -> None:
    proxy, make = proxied
    store = make(S3Settings(part_size=part_size * MIB))
    data = random.Random(3).randbytes(11 * MIB)
    store.write("a", data)
    assert proxy.count("PUT", "partNumber=") == parts
    assert store.read("a", sha256=sha256_hex(data)) == data


def test_what_fits_one_part_is_one_request(proxied: Proxied) -> None:
    proxy, make = proxied
    make(S3Settings(part_size=5 * MIB)).write("a", bytes(5 * MIB))
    assert (proxy.count("PUT"), proxy.count("POST")) == (1, 0)


@pytest.mark.parametrize("allowed", [1, 3])
def test_parts_in_flight(proxied: Proxied, allowed: int) -> None:
    proxy, make = proxied
    proxy.hold_until(allowed, "PUT", containing="partNumber=")
    make(S3Settings(part_size=5 * MIB, parts_in_flight=allowed)).write("a", bytes(16 * MIB))
    assert proxy.most_at_once == allowed


@pytest.mark.parametrize("part", [5, 8])
def test_copy_in_parts(proxied: Proxied, part: int) -> None:
    proxy, make = proxied
    store = make(S3Settings(part_size=5 * MIB, copy_part_size=part * MIB))
    data = random.Random(4).randbytes(6 * MIB)
    store.write("a", data)
    before = proxy.count("PUT", "partNumber=")
    store.copy("a", "b")
    assert proxy.count("PUT", "partNumber=") - before == (2 if part == 5 else 0)
    assert store.read("b") == data


def test_page_size(proxied: Proxied) -> None:
    proxy, make = proxied
    names = ["a", "b", "c"]
    for name in names:
        make().write(name, b"")
    for page_size, pages in ((2, 2), (1000, 1)):
        before = proxy.count("GET", "list-type=2")
        assert [item.key for item in make(S3Settings(page_size=page_size)).list()] == names
        assert proxy.count("GET", "list-type=2") - before == pages


def test_a_listing_is_read_page_by_page(proxied: Proxied) -> None:
    proxy, make = proxied
    for name in "abc":
        make().write(name, b"")
    listing = make(S3Settings(page_size=1)).list()
    assert next(listing).key == "a"
    assert proxy.count("GET", "list-type=2") == 1


def test_the_writers_memory_is_bounded(moto: S3Server, connect: Connect) -> None:
    settings = S3Settings(part_size=5 * MIB, parts_in_flight=2)
    store = S3Store(connect(moto), settings)
    store.write("warm", b"")  # the client itself takes memory once
    piece = memoryview(random.Random(5).randbytes(MIB))
    tracemalloc.start()
    try:
        with store.open_writer("big") as writer:
            for _ in range(64):
                writer.write(piece)
            written = writer.commit()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written.size == store.size("big") == 64 * MIB
    # Two parts under way and one being filled, which grows by an eighth at a time.
    assert peak < 3 * 5 * MIB * 1.3


def test_an_upload_beyond_the_most_parts_is_refused(
    moto: S3Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("counterweight.workers.storage.s3_writer.MAX_PARTS", 1)
    store = S3Store(connect(moto), S3Settings(part_size=5 * MIB))
    store.write("a", bytes(5 * MIB))
    with pytest.raises(RequestError, match="larger than 5242880 bytes"):
        store.write("a", bytes(5 * MIB + 1))
    assert store.size("a") == 5 * MIB


def test_errors_of_a_server_that_is_no_s3(bare: pytest.MonkeyPatch, moto: S3Server, connect: Connect) -> None:
    with FaultProxy(moto.endpoint) as proxy:
        connect(moto)
        bare.setenv("AWS_ENDPOINT_URL_S3", f"{proxy.endpoint}/nowhere")
        for use in uses(S3Store("s3://bucket", S3Settings(total_max_attempts=1))):
            proxy.reset()
            with pytest.raises(CounterweightError, match=r"s3://bucket"):
                use()
            assert 1 <= len(proxy.requests) <= 2, "boto3's own tries"
