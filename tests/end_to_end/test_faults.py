"""Faults on the way: the same bytes as without them, or a clear error and nothing published.

Most are made in this process, at every call and at every place; the last tests kill real processes under Ray.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from counterweight.pipeline.artifact import DOCUMENT, verify
from counterweight.pipeline.reaper import descendants
from counterweight.workers.errors import CounterweightError, IntegrityError, RequestError, StorageError, WorkerError
from counterweight.workers.tasks.compress import Compress
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.task import Task
from tests.pipeline.held_block import HeldBlock, shards_of
from tests.pipeline.tiny import (
    Death,
    Events,
    LocalPool,
    Run,
    actor_pids,
    alive,
    files_of,
    job_of,
    lengthened,
    local_path,
    run_local,
    until,
    write_job,
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def expected(manifest: Path) -> dict[str, bytes]:
    """The artifact's bytes without any fault."""
    return files_of(local_path(run_local(job_of(manifest)).uri))


class Once:
    """A fault at the `number`-th call of a job, and never again."""

    def __init__(self, number: int, fault: BaseException | Death) -> None:
        self._number, self._fault = number, fault
        self.calls = 0

    def __call__(self, worker: int, task: Task[Any]) -> BaseException | Death | None:
        self.calls += 1
        return self._fault if self.calls == self._number else None


class InBlock:
    """The first worker that compresses a block dies of it."""

    def __init__(self, index: int) -> None:
        self._index, self._died = index, False

    def __call__(self, worker: int, task: Task[Any]) -> Death | None:
        if self._died or not isinstance(task, Compress) or task.block.index != self._index:
            return None
        self._died = True
        return Death.BEFORE


@pytest.mark.parametrize(
    ("workers", "fault"),
    [(1, Death.BEFORE), (2, Death.AFTER), (2, StorageError("read s3://b/k: 503 SlowDown"))],
    ids=["a death before the work", "a death after the commit", "storage"],
)
def test_one_fault_at_any_call_leaves_no_trace_in_the_bytes(
    manifest: Path, expected: dict[str, bytes], tmp_path: Path, workers: int, fault: BaseException | Death
) -> None:
    number, seen = 0, True
    while seen:
        number += 1
        once, events = Once(number, fault), Events()
        pool = LocalPool(workers, fault=once)
        settings = (f"spec.output.uri={tmp_path / str(number)}", f"spec.resources.workers={workers}")
        published = run_local(job_of(manifest, *settings), pool, events)
        seen = once.calls >= number
        assert files_of(local_path(published.uri)) == expected
        assert sum(": try 1 of 3 failed: " in note for (note,) in events.named("note")) == seen
        assert len(pool.restarts) == (seen and isinstance(fault, Death))
    # inspect, embed, two blocks of two halves, two times kept tensors, the adapter, five checks, the validation
    assert number > 15


def test_every_worker_dies_once_in_every_task(manifest: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    seen: set[str] = set()

    def fault(worker: int, task: Task[Any]) -> Death | None:
        if task.name in seen:
            return None
        seen.add(task.name)
        return Death.AFTER

    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"), LocalPool(2, fault=fault))
    assert files_of(local_path(published.uri)) == expected


def test_compressed_propagation_survives_too(manifest: Path, tmp_path: Path) -> None:
    settings = ["spec.calibration.propagate=compressed", "spec.validation="]
    plain = run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'plain'}", *settings))
    for index in (0, 1):
        pool = LocalPool(2, fault=InBlock(index))
        faulty = run_local(job_of(manifest, f"spec.output.uri={tmp_path / str(index)}", *settings), pool)
        assert len(pool.restarts) == 1
        assert files_of(local_path(faulty.uri)) == files_of(local_path(plain.uri))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (StorageError("disk full"), StorageError, r"^block 1 \(block\) after 3 tries: disk full$"),
        (RequestError("not finite"), RequestError, r"^block 1 \(block\): not finite$"),
        (ZeroDivisionError("oops"), WorkerError, r"^block 1 \(block\): ZeroDivisionError: oops$"),
    ],
)
def test_a_fault_that_stays_ends_the_job_by_name_and_keeps_what_is_done(
    manifest: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    error: Exception,
    kind: type[CounterweightError],
    text: str,
) -> None:
    def fault(worker: int, task: Task[Any]) -> Exception | None:
        return error if isinstance(task, Compress) and task.block.index == 1 else None

    job = job_of(manifest, f"spec.output.uri={tmp_path}")
    with pytest.raises(kind, match=text):
        run_local(job, LocalPool(1, fault=fault))
    assert not list(tmp_path.rglob(DOCUMENT))
    events = Events()
    published = run_local(job, progress=events)
    assert events.named("plan") == [(2, 1)]
    assert files_of(local_path(published.uri)) == expected


def hidden_states(output: Path) -> list[Path]:
    """Blobs of hidden states, told by what they hold."""
    blobs = (output / "_work" / "blobs").iterdir()
    return [path for path in blobs if b'"hidden"' in path.read_bytes()[:200]]


def stopped_behind(manifest: Path, output: Path, kind: str) -> None:
    """A job that stops at the first task of a kind."""

    def fault(worker: int, task: Task[Any]) -> Exception | None:
        return RequestError("stopped") if task.kind == kind else None

    with pytest.raises(RequestError, match="stopped"):
        run_local(job_of(manifest, f"spec.output.uri={output}"), LocalPool(1, fault=fault))


def test_a_bit_that_turned_in_a_stored_activation_is_found(manifest: Path, tmp_path: Path) -> None:
    stopped_behind(manifest, tmp_path, "forward")  # the embedding's output is there
    # Of what is solved on; what is held out is smaller.
    blob = max(hidden_states(tmp_path), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"^block 0 \(forward\) after 3 tries: .*{blob.name}: sha256 is"):
        run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    assert not list(tmp_path.rglob(DOCUMENT))
    blob.unlink()  # what the message names can be thrown away: it is made again
    assert run_local(job_of(manifest, f"spec.output.uri={tmp_path}")).document.id


@pytest.mark.parametrize("validation", [True, False])
def test_a_finished_block_that_rotted_is_not_published_and_is_made_anew_by_the_next_run(
    manifest: Path, expected: dict[str, bytes], tmp_path: Path, validation: bool
) -> None:
    stopped_behind(manifest, tmp_path, "keep")  # all blocks are done
    blobs = [path for path in (tmp_path / "_work" / "blobs").iterdir() if b"weight_packed" in path.read_bytes()[:4000]]
    assert len(blobs) == 2
    data = bytearray(blobs[0].read_bytes())
    data[-1] ^= 1
    blobs[0].write_bytes(data)
    job = job_of(manifest, f"spec.output.uri={tmp_path}", *([] if validation else ["spec.validation="]))
    with pytest.raises(IntegrityError, match=r"^model-0000[23]-of-00004\.safetensors: not the bytes that were written"):
        run_local(job)
    assert not list(tmp_path.rglob(DOCUMENT))
    events = Events()
    published = run_local(job, progress=events)
    assert events.named("plan") == [(2, 1)]
    assert files_of(local_path(published.uri)) == expected
    assert verify(published.uri)


def test_a_blob_that_is_gone_is_made_again(manifest: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    stopped_behind(manifest, tmp_path, "keep")
    for path in (tmp_path / "_work" / "blobs").iterdir():
        if b"weight_packed" in path.read_bytes()[:4000]:
            path.unlink()
            break
    events = Events()
    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"), progress=events)
    assert events.named("plan") == [(2, 1)]
    assert files_of(local_path(published.uri)) == expected


def test_a_record_that_is_none_is_an_error_by_name(manifest: Path, tmp_path: Path) -> None:
    stopped_behind(manifest, tmp_path, "keep")
    record = next((tmp_path / "_work" / "commits" / "block").iterdir())
    record.write_text('{"index": 0}')
    with pytest.raises(IntegrityError, match=f"{record.name}: not a BlockRecord: ") as caught:
        run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_source_that_changed_under_the_job_is_refused(manifest: Path, tmp_path: Path) -> None:
    other = write_job(tmp_path / "job", layers=2)
    model = other.parent / "model" / "model.safetensors"

    def fault(worker: int, task: Task[Any]) -> None:
        if isinstance(task, Embed):
            data = bytearray(model.read_bytes())
            data[-1] ^= 1
            model.write_bytes(data)

    with pytest.raises(RequestError, match="the source changed while the job ran"):
        run_local(job_of(other), LocalPool(1, fault=fault))
    assert not list((other.parent / "out").rglob(DOCUMENT))


# -- two jobs on one workspace --------------------------------------------------------------------------------------


class Beside(Once):
    """Something that happens at the `number`-th call of a job, before the call."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        super().__init__(number, Death.BEFORE)
        self._act = act

    def __call__(self, worker: int, task: Task[Any]) -> None:
        if super().__call__(worker, task):
            self._act()


def test_a_job_goes_on_when_one_that_shares_its_work_is_published_and_throws_hidden_states_away(
    manifest: Path, tmp_path: Path
) -> None:
    """A sweep: jobs that differ in bits share the original's activations. At each call of the second job in turn, the
    first one runs to its end beside it."""
    sweep = ["spec.recipe.weights.bits=3", "spec.validation="]
    alone = run_local(job_of(manifest, f"spec.output.uri={tmp_path / 'alone'}", *sweep))
    # inspect, embed, two blocks of two halves, what lies outside of them: behind that, hidden states are not read.
    for number in range(1, 9):
        output = f"spec.output.uri={tmp_path / str(number)}"
        first = partial(run_local, job_of(manifest, output, "spec.validation="))
        published = run_local(job_of(manifest, output, *sweep), LocalPool(1, fault=Beside(number, first)))
        assert files_of(local_path(published.uri)) == files_of(local_path(alone.uri))


def test_two_runs_of_one_job_at_once_publish_one_artifact(
    manifest: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    for attempt in range(3):
        job = job_of(manifest, f"spec.output.uri={tmp_path / str(attempt)}")
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(run_local, job, LocalPool(2))
            time.sleep(0.15 * attempt)  # the second is behind by a part of the job
            second = threads.submit(run_local, job, LocalPool(2))
            found = [first.result(), second.result()]
        assert found[0].document == found[1].document
        assert verify(found[0].uri) == found[0].document
        assert files_of(local_path(found[0].uri)) == expected
        assert len(list((tmp_path / str(attempt)).rglob(DOCUMENT))) == 1


# -- real processes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Undisturbed:
    """files: of the artifact. shards: sha256 of each block's, by which its worker can be held."""

    files: dict[str, bytes]
    shards: list[str]


@pytest.fixture(scope="module")
def long_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lengthened(write_job(tmp_path_factory.mktemp("long"), layers=3))


@pytest.fixture(scope="module")
def undisturbed(long_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    output = tmp_path_factory.mktemp("expected")
    files = files_of(local_path(run_local(job_of(long_manifest, f"spec.output.uri={output}")).uri))
    return Undisturbed(files, shards_of(output))


def commits(output: Path) -> dict[str, tuple[int, bytes]]:
    """Committed records: name -> inode and bytes. Who uses a record touches it; who writes it again makes another file."""
    found = (output / "_work" / "commits").rglob("*.json")
    return {path.relative_to(output).as_posix(): (path.stat().st_ino, path.read_bytes()) for path in found}


@pytest.fixture
def driver() -> Iterator[list[Run]]:
    """Runs of a test; what is left of them is killed at its end."""
    runs: list[Run] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            run.kill()


def program(pid: int) -> str:
    """What a process runs; nothing when it is over."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().partition("\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


TWO_WORKERS = ("--set", "spec.resources={workers: 2, cpus_per_worker: 1}")


def both_in_a_block(
    manifest: Path, undisturbed: Undisturbed, output: Path, driver: list[Run]
) -> tuple[Run, list[HeldBlock], list[int]]:
    """A run on two workers, each of which is held in the middle of one of the first two blocks; and their processes."""
    held = [HeldBlock(output, shard) for shard in undisturbed.shards[:2]]
    run = Run(manifest, "--output", str(output), *TWO_WORKERS)
    driver.append(run)
    run.wait_until(lambda: all(block.reached() for block in held))
    workers = actor_pids(run.process.pid)
    assert len(workers) == 2
    return run, held, workers


@pytest.mark.end_to_end
def test_a_worker_killed_in_the_middle_of_a_block_is_replaced(
    long_manifest: Path, undisturbed: Undisturbed, tmp_path: Path, driver: list[Run]
) -> None:
    """Two workers, each of which is killed in its block."""
    run, held, workers = both_in_a_block(long_manifest, undisturbed, tmp_path, driver)
    for victim in workers:
        os.kill(victim, signal.SIGKILL)
        run.wait_for(f"(process {victim}) died")
        run.wait_until(lambda gone=victim: len(set(actor_pids(run.process.pid)) - {gone}) == 2)  # type: ignore[misc]
    for block in held:
        block.release()
    code, out, err = run.finish()
    assert code == 0, err
    for index in (0, 1):
        assert f"block {index} (block): try 1 of 3 failed: worker " in err
    assert len(out.splitlines()) == 1, "Ray's own words about dead workers are not the result"
    assert files_of(local_path(out.strip())) == undisturbed.files
    assert verify(out.strip())


@pytest.mark.end_to_end
def test_a_job_that_is_interrupted_then_killed_then_run_twice_at_once_ends_in_the_same_bytes(
    long_manifest: Path, undisturbed: Undisturbed, tmp_path: Path, driver: list[Run]
) -> None:
    # 1. Control-C, as a terminal sends it: to the whole group.
    held = HeldBlock(tmp_path, undisturbed.shards[0])
    run = Run(long_manifest, "--output", str(tmp_path))
    driver.append(run)
    run.wait_until(held.reached)
    workers = actor_pids(run.process.pid)
    assert workers
    os.killpg(run.process.pid, signal.SIGINT)
    code, out, err = run.finish()
    held.release()
    assert code == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted: finished blocks are kept; run the same command again to resume"
    assert "Traceback" not in err
    until(lambda: not any(map(alive, workers)))
    # 2. The driver is killed with everything around it, when a block has been committed and the next one has not.
    held = HeldBlock(tmp_path, undisturbed.shards[1])
    run = Run(long_manifest, "--output", str(tmp_path))
    driver.append(run)
    run.wait_until(held.reached)
    workers = run.kill()
    until(lambda: not any(map(alive, workers)))
    held.release()
    assert not list(tmp_path.rglob(DOCUMENT))
    before = commits(tmp_path)
    assert len([name for name in before if "/block/" in name]) == 1
    # 3. Two drivers on what is left.
    runs = [Run(long_manifest, "--output", str(tmp_path)) for _ in range(2)]
    driver += runs
    ends = [run.finish() for run in runs]
    assert [code for code, _, _ in ends] == [0, 0], [err for _, _, err in ends]
    assert ends[0][1] == ends[1][1]
    after = commits(tmp_path)
    assert {name: after[name] for name in before} == before, "committed work was done again"
    assert any("resuming: 1 of 3 blocks were finished before" in err for _, _, err in ends)
    (document,) = tmp_path.rglob(DOCUMENT)
    assert document.parent == local_path(ends[0][1].strip())
    assert files_of(document.parent) == undisturbed.files
    assert verify(ends[0][1].strip())


@pytest.mark.end_to_end
def test_a_sigterm_ends_the_job_in_one_line_and_leaves_nothing_running(
    long_manifest: Path, undisturbed: Undisturbed, tmp_path: Path, driver: list[Run]
) -> None:
    held = HeldBlock(tmp_path, undisturbed.shards[0])
    run = Run(long_manifest, "--output", str(tmp_path))
    driver.append(run)
    run.wait_until(held.reached)
    below = descendants(run.process.pid)
    os.kill(run.process.pid, signal.SIGTERM)
    code, out, err = run.finish()
    assert (code, out) == (143, ""), err
    assert err.splitlines()[-1] == "terminated: finished blocks are kept; run the same command again to resume"
    assert "Traceback" not in err
    assert "logging.cc" not in err
    until(lambda: not any(alive(pid) for pid, _ in below))
    assert not list((tmp_path / ".counterweight-probe").rglob("*/seen"))


@pytest.mark.end_to_end
def test_a_head_that_is_gone_ends_the_job_in_one_line(
    long_manifest: Path, undisturbed: Undisturbed, tmp_path: Path, driver: list[Run]
) -> None:
    """In ours: Ray itself would end the process after a minute, with another code and other words."""
    held = HeldBlock(tmp_path, undisturbed.shards[0])
    run = Run(long_manifest, "--output", str(tmp_path), "--address", "local")
    driver.append(run)
    run.wait_until(held.reached)
    programs = {pid: program(pid) for pid, _ in descendants(run.process.pid)}
    (head,) = [pid for pid, name in programs.items() if "gcs_server" in name]
    os.kill(head, signal.SIGKILL)
    code, out, err = run.finish()
    assert (code, out) == (4, ""), err
    assert err.splitlines()[-1].startswith("error: Ray's head at 127.0.0.1:")
    until(lambda: not any(map(alive, programs)))


@pytest.mark.end_to_end
def test_a_frozen_worker_costs_its_task_and_no_more(
    long_manifest: Path, undisturbed: Undisturbed, tmp_path: Path, driver: list[Run]
) -> None:
    run, held, (victim, _) = both_in_a_block(long_manifest, undisturbed, tmp_path, driver)
    os.kill(victim, signal.SIGSTOP)
    # By the pool, or by Ray, whose connection breaks a little earlier.
    run.wait_for(f"(process {victim})")
    for block in held:
        block.release()
    code, out, err = run.finish()
    assert code == 0, err
    assert files_of(local_path(out.strip())) == undisturbed.files
    until(lambda: not alive(victim))
