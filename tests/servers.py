"""S3 servers for tests, on the loopback interface: moto (a fake, fast), Ceph (real), Swift (real, not
atomic).

Each is a context manager that stops exactly the processes it started. A server whose program is absent
skips the test that asks for it, unless COUNTERWEIGHT_REQUIRE_SERVERS=1 is set, as it is in CI: then its
absence is a failure.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import boto3
import pytest

from tests.patience import PATIENCE

_SCRIPTS = Path(__file__).parent.parent / "infra" / "s3"
_SWIFT_VERSION = "2.38.3"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """Where a server listens, and a user's keys."""

    endpoint: str
    access_key: str
    secret_key: str
    region: str

    def behind(self, endpoint: str) -> S3Server:
        """The same server, reached through a proxy."""
        return replace(self, endpoint=endpoint)

    def with_bucket(self, name: str) -> S3Server:
        """The same server, with a new bucket in it."""
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
        )
        client.create_bucket(Bucket=name)
        return self

    def environment(self) -> dict[str, str]:
        """The standard AWS environment that leads every client here, whatever the machine's own profile
        says."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


# Leads the test's clients to a server; returns a fresh root URI there.
Connect = Callable[[S3Server], str]


@contextlib.contextmanager
def moto_server() -> Iterator[S3Server]:
    """moto in a process of its own: what it holds in memory is not the test's."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-I", str(Path(__file__).with_name("atomic_moto.py"))]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            endpoint = _moto_endpoint(process, log.fileno())
            yield S3Server(endpoint=endpoint, access_key="moto", secret_key="moto", region="us-east-1")
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _moto_endpoint(process: subprocess.Popen[bytes], log: int) -> str:
    """Reads the port that the kernel chose from what moto prints, and waits until it answers."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
        printed = os.pread(log, 1 << 16, 0).decode()
        if "http://127.0.0.1:" in printed:
            endpoint = "http://127.0.0.1:" + printed.split("http://127.0.0.1:")[1].split()[0]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5):
                return endpoint
    raise RuntimeError(f"moto did not start: {os.pread(log, 1 << 16, 0).decode()}")


@contextlib.contextmanager
def ceph_server(directory: Path) -> Iterator[S3Server]:
    """Ceph's gateway with its data below `directory`."""
    if shutil.which("radosgw") is None:
        absent("radosgw is not installed")
    with _scripted("ceph_rgw.py", ["--directory", str(directory)]) as server:
        yield server


@contextlib.contextmanager
def swift_server(directory: Path) -> Iterator[S3Server]:
    """Swift with its data below `directory`, in a virtual environment that is made once and kept."""
    python = str(_swift_python())
    with _scripted("swift.py", ["--directory", str(directory)], ["--python", python]) as server:
        yield server


def absent(reason: str) -> NoReturn:
    """Skips the test, or fails it where every server must be there."""
    if os.environ.get("COUNTERWEIGHT_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{reason}, and COUNTERWEIGHT_REQUIRE_SERVERS=1")
    pytest.skip(reason)


def start_ceph(directory: Path) -> S3Server:
    """Starts what does not run of the Ceph below `directory`; returns where it listens."""
    return _start("ceph_rgw.py", ["--directory", str(directory)])


def kill_ceph(directory: Path) -> None:
    """Kills every daemon of the Ceph below `directory` without warning, as a power cut would."""
    for record in (directory / "run").glob("*.json"):
        os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)


@contextlib.contextmanager
def _scripted(script: str, where: Sequence[str], how: Sequence[str] = ()) -> Iterator[S3Server]:
    try:
        yield _start(script, [*where, *how])
    finally:
        subprocess.run([sys.executable, str(_SCRIPTS / script), "stop", *where], timeout=PATIENCE, check=True)


def _start(script: str, arguments: Sequence[str]) -> S3Server:
    command = [sys.executable, str(_SCRIPTS / script), "start", *arguments]
    started = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=True)
    answer: Mapping[str, str] = json.loads(started.stdout)
    return S3Server(**answer)


def _swift_python() -> Path:
    if ctypes.util.find_library("erasurecode") is None:
        absent("liberasurecode is not installed")
    home = Path(tempfile.gettempdir()) / f"counterweight-swift-{_SWIFT_VERSION}-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    python = home / "venv" / "bin" / "python"
    done = home / "done"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test runs may come here at once
        if not done.exists():
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(home / "venv")],
                [str(python), "-m", "pip", "install", "--quiet", f"swift=={_SWIFT_VERSION}"],
            ):
                result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
                if result.returncode != 0:
                    absent(f"Swift could not be installed: {result.stderr.strip()[-300:]}")
            done.touch()
    return python
