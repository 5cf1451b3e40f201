"""Commands that need not import torch again: forks of a process that has done it, and has no threads.

For many short runs of `counterweight`: an import costs several times the processor time of a small job. What runs is the
command's own `main`, in a session of its own, without having been loaded from the disk.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO


class Warm:
    """Starts a command at a time. Made by `warm`."""

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        self._server = server

    def __call__(self, arguments: Sequence[str], stderr: IO[bytes]) -> WarmProcess:
        """`counterweight` with these arguments, in this process's environment."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        stdout = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 - lives as long as the process
        outputs = [stdout.name, f"/proc/{os.getpid()}/fd/{stderr.fileno()}"]
        asked = {"arguments": list(arguments), "environment": dict(os.environ), "outputs": outputs}
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        return WarmProcess(int(self._server.stdout.readline()), self._server.stdout, stdout)


class WarmProcess:
    """What tests use of `subprocess.Popen`."""

    def __init__(self, pid: int, ends: IO[bytes], stdout: IO[str]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ends, self._stdout = ends, stdout

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ends], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("counterweight", timeout or 0.0)
            self.returncode = int(self._ends.readline())
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._stdout.read(), None


@contextmanager
def warm() -> Iterator[Warm]:
    """As long as the context lasts."""
    command = [sys.executable, "-m", "tests.faults.warm"]
    # Without buffers: `select` would not see what lies in one.
    with subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            yield Warm(server)
        finally:
            assert server.stdin is not None
            server.stdin.close()


def _serve() -> None:
    """Forks a command for each line, and says its id and then its exit code."""
    import counterweight.pipeline.cli
    import counterweight.pipeline.forked_pool
    import counterweight.pipeline.opening
    import counterweight.pipeline.orchestrator
    import counterweight.workers.compressed_block
    import counterweight.workers.evaluation
    import counterweight.workers.worker  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(**json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(arguments: Sequence[str], environment: dict[str, str], outputs: Sequence[str]) -> None:
    """The command, in the place of this process."""
    from counterweight.pipeline.cli import entry

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((0, os.devnull), *zip((1, 2), outputs, strict=True)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
    sys.stdin = open(0)  # noqa: SIM115
    sys.argv = ["counterweight", *arguments]
    entry()


if __name__ == "__main__":
    _serve()
