"""How long `POST /v1/jobs` takes when many clients submit at once, at two instances of the service beside each other.

    python benchmarks/submissions.py [--jobs 200] [--clients 20] [--store URI] [--kill] [--record]

Real processes on loopback; the clients are threads of one further process, each with its own connection and one request under
way, in the standard library's HTTP, since what a client computes is in the figure. Every job is then there once, or this fails.
Without --store, in a folder, where a create waits for the disk three times. --kill: one instance is killed when a third of the
jobs are there, and its clients repeat at the other one what was not answered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Barrier

from common import machine, record, table, versions

from counterweight.pipeline.jobs.store import JobStore

TOKEN = "of-the-benchmark"


def document(number: int) -> dict[str, object]:
    """A manifest of its own."""
    source = {"uri": "file:/allowed/text.txt"}
    return {
        "apiVersion": "counterweight/v1",
        "kind": "CompressionJob",
        "metadata": {"name": f"job-{number}"},
        "spec": {
            "model": {"uri": "file:/allowed/model"},
            "calibration": {"source": source, "sequences": 12, "sequence_length": 32},
            "recipe": {"weights": {"bits": 4, "group_size": 32}},
            "output": {"uri": "file:/allowed/out"},
        },
    }


def serve(store: str, tokens: Path) -> tuple[subprocess.Popen[str], str]:
    """A service at a free port, and its URL."""
    options = ["--store", store, "--tokens", str(tokens), "--allow", "file:/allowed", "--port", "0", "--rate", "100000"]
    command = [sys.executable, "-m", "counterweight.pipeline.cli", "serve", *options, "--burst", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    return process, next(found[0] for line in process.stderr if (found := re.search(r"http://[0-9.:]+", line)))


def ask(client: HTTPConnection, number: int) -> None:
    """Submits a job; OSError and HTTPException without an answer."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    client.request("POST", "/v1/jobs", json.dumps(document(number)), headers)
    answer = client.getresponse()
    text = answer.read()
    assert answer.status in (200, 201), text


def submit(urls: Sequence[str], numbers: range, ready: Barrier) -> Iterator[float]:
    """Seconds of each request of one client, which begins when all are ready. urls: of the instance that it asks, and of the
    one that it turns to when that one is gone."""
    first, second = (HTTPConnection(url.removeprefix("http://"), timeout=60) for url in urls)
    with closing(first), closing(second):
        first.connect()
        ready.wait()
        for number in numbers:
            begun = time.perf_counter()
            try:
                ask(first, number)
            except (OSError, HTTPException):
                first = second
                ask(first, number)
            yield time.perf_counter() - begun


def measure(store: str, tokens: Path, jobs: int, clients: int, kill: bool) -> tuple[list[float], float]:
    """Seconds of every request, sorted, and of all of them together."""
    services = [serve(store, tokens) for _ in range(2)]
    urls = [url for _, url in services]

    def client(number: int) -> list[float]:
        return list(submit(urls[:: 1 - 2 * (number % 2)], range(number, jobs, clients), ready))

    try:
        with ThreadPoolExecutor(clients) as threads:
            ready = Barrier(clients + 1)
            found = threads.map(client, range(clients))
            ready.wait()
            begun = time.perf_counter()
            if kill:
                seen = JobStore.at(store)
                while len(seen.all()) < jobs // 3:
                    time.sleep(0.01)
                services[0][0].kill()
            seconds = sorted(one for each in found for one in each)
            whole = time.perf_counter() - begun
    finally:
        for process, _ in services:
            process.terminate()
            process.communicate()
    known = len(JobStore.at(store).all())
    assert known == jobs, f"{known} jobs: expected {jobs}"
    return seconds, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--store", help="an empty store; default: a folder")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        tokens.write_text(json.dumps([{"name": "benchmark", "role": "submitter", "sha256": digest}]))
        store = arguments.store or (Path(folder) / "store").as_uri()
        seconds, whole = measure(store, tokens, arguments.jobs, arguments.clients, arguments.kill)
    ranks = {"median": statistics.median(seconds), "p95": seconds[int(0.95 * len(seconds))], "worst": seconds[-1]}
    row = [str(len(seconds)), str(arguments.clients), *(f"{1000 * value:.0f}" for value in ranks.values())]
    body = table(["jobs", "clients", *(f"{name}, ms" for name in ranks), "all, s"], [[*row, f"{whole:.1f}"]])
    print(body)
    if arguments.record:
        about = f"{machine()}; {versions('fastapi', 'uvicorn')}."
        print(record("submissions", "POST /v1/jobs by many clients", body, about))


if __name__ == "__main__":
    main()
