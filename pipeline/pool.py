"""Worker processes under Ray: start them, hand them tasks, notice when they die.

One long-lived actor per worker (a GPU task would otherwise start a process per task). Ray retries nothing for us: what
to do about a failure is the orchestrator's policy.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from counterweight.workers.errors import CounterweightError, RequestError, WorkerError
from counterweight.workers.process import WorkerProcess

if TYPE_CHECKING:
    from counterweight.workers.tasks.setting import Device
    from counterweight.workers.tasks.task import Task

EMBEDDED_STORE_BYTES = 128 << 20
"""Ray's object store in the embedded cluster: tasks exchange records of kilobytes; tensors go through storage."""

LOOPBACK = "127.0.0.2"
"""Address of the embedded node. Ray 2.60 replaces 127.0.0.1 by an address that other machines can reach."""

START_SECONDS = 300.0
"""How long a worker may take to import torch and answer for the first time, on a loaded machine."""

CONNECT_SECONDS = 5.0
"""How long a cluster may take to accept a connection."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished call: its value, or the error. worker_died: the process is gone."""

    ticket: int
    worker: int
    value: object = None
    error: BaseException | None = None
    worker_died: bool = False


class WorkerPool(Protocol):
    """What the orchestrator needs of a pool."""

    size: int
    threads: int
    """Of each worker, that share the shards of a task."""

    def submit(self, worker: int, task: Task[object]) -> int:
        """Starts a task on a worker; returns a ticket."""

    def wait(self, seconds: float) -> list[Outcome]:
        """Outcomes that arrived, waiting at most `seconds` for the first."""

    def restart(self, worker: int) -> None:
        """Puts a fresh process in the place of a dead one."""

    def close(self) -> None:
        """Ends the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """workers: how many. cpus: of each, also its threads. gpus: of each; fractions share a GPU."""

    workers: int
    cpus: int
    gpus: float

    @property
    def device(self) -> Device:
        """The kind of device that the manifest asks for."""
        return "cuda" if self.gpus > 0 else "cpu"


class RayPool:
    """Workers as Ray actors. Create inside `cluster(...)`."""

    def __init__(self, size: PoolSize) -> None:
        import ray

        self._ray = ray
        self._class = ray.remote(WorkerProcess).options(
            num_cpus=size.cpus, num_gpus=size.gpus, max_restarts=0, max_task_retries=0
        )
        self._arguments = (size.device, size.cpus)
        self.size, self.threads = size.workers, 1 if size.gpus else size.cpus
        self._actors = [self._class.remote(*self._arguments) for _ in range(size.workers)]
        self._pending: dict[object, tuple[int, int]] = {}
        self._tickets = 0

    def devices(self) -> list[str]:
        """Waits until every worker answers; returns the device each computes on. WorkerError when one does not."""
        calls = [actor.ready.remote() for actor in self._actors]
        try:
            devices: list[str] = self._ray.get(calls, timeout=START_SECONDS)
        except self._ray.exceptions.GetTimeoutError as error:
            raise WorkerError(f"{self.size} workers did not start within {START_SECONDS:.0f} s") from error
        except self._ray.exceptions.RayError as error:
            raise WorkerError(f"a worker did not start: {error}") from error
        return devices

    def submit(self, worker: int, task: Task[object]) -> int:
        reference = self._actors[worker].run.remote(task)
        self._tickets += 1
        self._pending[reference] = (self._tickets, worker)
        return self._tickets

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._pending:
            return []
        done, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        return [self._outcome(reference) for reference in done]

    def restart(self, worker: int) -> None:
        self._ray.kill(self._actors[worker])
        self._actors[worker] = self._class.remote(*self._arguments)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._pending.clear()

    def _outcome(self, reference: object) -> Outcome:
        ticket, worker = self._pending.pop(reference)
        errors = self._ray.exceptions
        try:
            return Outcome(ticket, worker, value=self._ray.get(reference))
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if cause is not error and not isinstance(cause, CounterweightError):
                cause.__cause__ = error  # a defect: where it was raised stands in Ray's text
            return Outcome(ticket, worker, error=cause)
        except errors.RayError as error:  # the actor or its node is gone, or ran out of memory
            text = " ".join(str(error).split())
            return Outcome(ticket, worker, error=WorkerError(f"worker {worker} died: {text}"), worker_died=True)


@contextmanager
def cluster(address: str | None, size: PoolSize) -> Iterator[None]:
    """Connects to a Ray cluster, or starts an embedded one that ends with the context.

    address: None or "local" for an embedded one on loopback, "auto" or ray://host:port for one that runs. An embedded
    cluster pretends to have the GPUs that are asked for: workers then compute on the CPU, and say so. A running cluster
    that cannot hold the workers is refused at once, because Ray itself would wait for ever.
    """
    import ray

    embedded = address in (None, "local")
    if address is not None and not embedded:
        _answers(address)
    # Ray reads these from the environment only: no usage report, and no merging of our log lines.
    with _environment({"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}):
        try:
            if embedded:
                ray.init(
                    address="local",
                    num_cpus=max(size.workers * size.cpus, 1),
                    num_gpus=_embedded_gpus(size),
                    include_dashboard=False,
                    object_store_memory=EMBEDDED_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address=LOOPBACK,
                )
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise WorkerError(f"Ray at {address or 'local'}: {error}") from error
    try:
        if not embedded:
            _admit(ray.cluster_resources(), size)
        yield
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """WorkerError when nobody listens at host:port, where Ray itself would try for four minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise WorkerError(f"Ray at {address}: {error.strerror or error}: expected a running cluster") from error


def _admit(resources: Mapping[str, float], size: PoolSize) -> None:
    wanted = {"CPU": float(size.workers * size.cpus), "GPU": size.workers * size.gpus}
    short = [f"{amount:g} {name}" for name, amount in wanted.items() if resources.get(name, 0.0) < amount]
    if short:
        have = ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in wanted)
        raise RequestError(f"spec.resources: asks for {' and '.join(short)}: the cluster has {have}")


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


def threads_per_worker(cpus: int | None, workers: int, *, available: Sequence[int]) -> int:
    """CPUs of each worker: as the manifest says, otherwise an equal share of this machine's."""
    return cpus if cpus is not None else max(1, len(available) // workers)
