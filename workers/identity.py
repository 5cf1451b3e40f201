"""Who a worker is: the code and the libraries that determine what it computes, and whether it sees the job's storage.

Workers whose code or libraries differ compute other bits under the same keys; the driver refuses them.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from counterweight.workers.errors import CounterweightError
from counterweight.workers.storage import open_store

LIBRARIES = ("torch", "transformers", "safetensors", "pydantic")
"""What determines bits, or whether both sides read each other's messages."""

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """code: sha256 of the package's sources. libraries: name -> version."""

    code: str
    libraries: Mapping[str, str] = field(default_factory=dict)

    def differences(self, other: Identity) -> list[str]:
        """What `other` has that is not the same, for people."""
        found = [] if self.code == other.code else [f"code {other.code[:12]} (the driver's is {self.code[:12]})"]
        names = sorted(self.libraries.keys() | other.libraries.keys())
        return found + [
            f"{name} {other.libraries.get(name, 'none')} (the driver has {self.libraries.get(name, 'none')})"
            for name in names
            if self.libraries.get(name) != other.libraries.get(name)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """An object that the driver has written to the job's output, for workers to read."""

    uri: str
    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker says of itself when it first answers. device: the kind that it computes on. host, pid: where it runs.
    storage: why it does not see the job's storage; empty when it does. gpu_bytes: memory of its GPU; 0 without one."""

    device: str
    identity: Identity
    host: str
    pid: int
    storage: str = ""
    gpu_bytes: int = 0

    @property
    def place(self) -> str:
        """For people."""
        return f"{self.host} (process {self.pid})"


@cache
def identity() -> Identity:
    """Of this process."""
    return Identity(code=code_digest(PACKAGE), libraries={name: metadata.version(name) for name in LIBRARIES})


def code_digest(package: Path) -> str:
    """sha256 of the Python sources below a package, with their names; links are followed."""
    digest = hashlib.sha256()
    for directory, folders, files in os.walk(package, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(directory) / name
                data = path.read_bytes()
                digest.update(f"{path.relative_to(package).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def report(device: str, token: Token | None, gpu_bytes: int = 0) -> WorkerReport:
    """Of this process. token: what it should find in the job's storage. gpu_bytes: see `WorkerReport`."""
    host, pid = socket.gethostname(), os.getpid()
    return WorkerReport(
        device=device, identity=identity(), host=host, pid=pid, storage=_sight(token), gpu_bytes=gpu_bytes
    )


def _sight(token: Token | None) -> str:
    """Why the token cannot be read here; empty when it can."""
    if token is None:
        return ""
    try:
        found = open_store(token.uri).read(token.key)
    except CounterweightError as error:
        return str(error)
    return "" if found == token.value else f"{token.uri}: {token.key} holds other bytes than the driver wrote"
