"""The Ray cluster of a job: an embedded one that ends with it, or one that runs."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from counterweight.pipeline.pool import PoolSize
from counterweight.pipeline.reaper import reaper
from counterweight.pipeline.signals import kept
from counterweight.workers.errors import WorkerError

RECORDS_BYTES = 128 << 20
"""Ray's object store in an embedded cluster of one worker: tasks exchange records of kilobytes."""

SHARED_MEMORY = Path("/dev/shm")
"""Where Ray keeps the object store: files in memory, of which a page is taken when it is first written to."""

LOOPBACK, BESIDE = "127.0.0.1", "127.0.0.2"
"""Addresses of the embedded node. On the first, Ray's processes accept connections from this machine alone, on any other from
everywhere. But Ray 2.60 replaces the first by an address that others can reach, unless its environment has said when it was
imported that there are no others."""

CONNECT_SECONDS = 5.0
"""How long a cluster may take to accept a connection."""

HEAD_SECONDS = 5.0
"""How long the cluster's head may refuse connections. Ray itself ends the process after a minute."""

ATTEMPTS = 4
"""Starts of an embedded Ray: on a loaded machine its own deadlines pass, of which one is thirty seconds whatever it is told."""

ENVIRONMENT = {
    # Ray reads these from the environment only: no usage report, and no merging of our log lines.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # A machine under load takes longer than Ray's ten seconds.
    "RAY_raylet_start_wait_time_s": "120",
    # A connection whose other end is frozen or cut off breaks after ten seconds; Ray's own default is seven minutes.
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


def embedded(address: str | None) -> bool:
    """Whether an address means a cluster of the job's own."""
    return address in (None, "local")


@contextmanager
def cluster(address: str | None, size: PoolSize) -> Iterator[None]:
    """Connects to a Ray cluster, or starts an embedded one that ends with the context.

    address: None or "local" for an embedded one on loopback, "auto" or ray://host:port for one that runs; that one is sent this
    process's code of the package. An embedded cluster pretends to have the GPUs that are asked for: workers then compute on
    the CPU, and say so. Raises WorkerError when there is no cluster.
    """
    with _environment({**ENVIRONMENT, **(_private() if embedded(address) else {})}), kept():
        import ray  # which reads some of this environment when it is imported

        if embedded(address):
            _start(size)
        else:
            assert address is not None
            _connect(address)
    with reaper() if embedded(address) else nullcontext(lambda: None) as ending:
        try:
            yield
        finally:
            ending()  # a node that is frozen would not let Ray go
            ray.shutdown()


@cache
def _private() -> dict[str, str]:
    """Lets only this process and its children talk to its clusters: a token that is in no file, no nodes but this one. Empty
    where somebody has imported Ray before: it has read its environment, and uses the token of the user's home."""
    if "ray" in sys.modules:
        return {}
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Where Ray has no clusters of several machines, everything is on loopback; there, they must be switched on.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _start(size: PoolSize) -> None:
    import ray

    gpus = _embedded_gpus(size)
    cause = ""
    for _ in range(ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=max(size.workers * size.cpus, 1),
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=store_bytes(size),
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address=LOOPBACK if _private() else BESIDE,
            )
        except Exception as error:  # noqa: BLE001 - Ray raises the base class when its node is late
            cause = " ".join(str(error).split())
            ray.shutdown()
        else:
            return
    raise WorkerError(f"Ray did not start on this machine in {ATTEMPTS} attempts: {cause}")


def store_bytes(size: PoolSize) -> int:
    """Bound of the object store: with several workers, which pass hidden states through it, half of the memory that the system
    has for such files."""
    try:
        free = os.statvfs(SHARED_MEMORY)
    except OSError:
        return RECORDS_BYTES
    return max(RECORDS_BYTES, free.f_bavail * free.f_frsize // 2 if size.workers > 1 else 0)


def _connect(address: str) -> None:
    import ray

    import counterweight

    _answers(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Nodes need our dependencies, and not this version of our code.
            runtime_env={"py_modules": [os.path.dirname(counterweight.__file__)], "env_vars": _passed_on()},
        )
    except Exception as error:
        cause = " ".join(str(error).split())
        raise WorkerError(f"Ray at {address}: {cause}") from error


def _passed_on() -> dict[str, str]:
    """Settings of ours in the environment, which hold for workers too."""
    return {name: value for name, value in os.environ.items() if name.startswith("COUNTERWEIGHT_")}


def _answers(address: str) -> None:
    """WorkerError when nobody listens at host:port, where Ray itself would try for four minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    problem = unreachable(host, int(port))
    if problem:
        raise WorkerError(f"Ray at {address}: {problem}: expected a running cluster")


def unreachable(host: str, port: int) -> str:
    """Why no connection can be made; empty when one can."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


class Head:
    """Watches the cluster's head: Ray would end this process without a word of ours when it is gone. clock: seconds."""

    def __init__(self, ray: object, clock: Callable[[], float]) -> None:
        from ray.util import client

        address = "" if client.ray.is_connected() else str(ray.get_runtime_context().gcs_address)  # type: ignore[attr-defined]
        self._host, _, self._port = address.rpartition(":")
        self._clock, self._looked = clock, clock()
        self._missed: float | None = None
        """When nobody listened there for the first time since somebody did."""

    def check(self) -> None:
        """WorkerError when nobody has listened at its address for `HEAD_SECONDS`, in two looks at least."""
        now = self._clock()
        if not self._host or now - self._looked < 1.0:
            return
        self._looked = now
        problem = unreachable(self._host, int(self._port))
        if not problem:
            self._missed = None
        elif self._missed is None:
            self._missed = now
        elif now - self._missed > HEAD_SECONDS:
            raise WorkerError(f"Ray's head at {self._host}:{self._port} is gone: {problem}")


def _embedded_gpus(size: PoolSize) -> int:
    """GPUs of the embedded node: this machine's, or as many pretended ones as the workers ask for."""
    if size.gpus <= 0:
        return 0
    from torch import cuda

    return max(int(cuda.device_count()), math.ceil(size.workers * size.gpus))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
