"""The S3 server of the compose file, as its container runs it: with the keys of a file, and not the tests'."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import boto3
import pytest
from botocore.exceptions import ClientError

from tests.infra.artefacts import COMPOSE, CONTAINERFILES, INFRA, instructions, services
from tests.servers import absent

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the endpoint that it says."""
    if shutil.which("radosgw") is None:
        absent("radosgw is not installed")
    place = tmp_path_factory.mktemp("s3")
    (image,) = [path for path in CONTAINERFILES if path.parent == COMPOSE.parent]
    (copied,) = [rest.split()[:-1] for name, rest in instructions(image) if name == "COPY"]
    for file in copied:
        shutil.copy(INFRA.parent / file, place)
    (place / "credentials").write_text("[default]\naws_access_key_id = somebody\naws_secret_access_key = s%cret+/\n")
    command = [str(word) for word in services()["s3"]["command"]]
    for option, value in (("--directory", place / "data"), ("--credentials", place / "credentials"), ("--port", 0)):
        command[command.index(option) + 1] = str(value)
    command[command.index("--host") + 1] = "127.0.0.1"
    program = [sys.executable, str(place / "s3.py"), *command]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().removeprefix("ready: ").strip()
    finally:
        process.terminate()
        process.wait(60)


def buckets(endpoint: str, access: str, secret: str, make: str | None = None) -> list[str]:
    """Names of a user's buckets, one more of which may be made before."""
    client = boto3.session.Session().client(
        "s3", endpoint_url=endpoint, aws_access_key_id=access, aws_secret_access_key=secret, region_name="us-east-1"
    )
    if make is not None:
        client.create_bucket(Bucket=make)
    return [str(bucket["Name"]) for bucket in client.list_buckets()["Buckets"]]


def test_it_knows_the_keys_of_its_file_alone_and_ends_with_its_daemons(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, endpoint = server
    for _ in range(2):  # as compose does at each start
        assert buckets(endpoint, "somebody", "s%cret+/", make="counterweight") == ["counterweight"]
    for access, secret in (("TESTACCESSKEY", "testsecretkey"), ("somebody", "wrong")):
        with pytest.raises(ClientError):
            buckets(endpoint, access, secret)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0
    with pytest.raises(Exception, match="connect"):
        buckets(endpoint, "somebody", "s%cret+/")
