"""Disks that really are full: the job says which place, leaves nothing half written, and goes on when there is room."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from counterweight.pipeline.artifact import DOCUMENT, pull, verify
from counterweight.workers.errors import StorageError, SurroundingsError
from counterweight.workers.storage import open_store
from tests.disks import Disk, can_mount, small_disk
from tests.pipeline.tiny import LocalPool, Run, files_of, job_of, local_path, run_local, write_job

ROOM = 1 << 30
FULL = "No space left on device"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not can_mount():
        pytest.skip("nobody but root may mount a disk here")
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def undisturbed(manifest: Path) -> Path:
    """The artifact's folder."""
    return local_path(run_local(job_of(manifest)).uri)


@pytest.fixture(scope="module")
def taken(undisturbed: Path) -> int:
    """Bytes that the job leaves behind, in whole pages."""
    files = (path for path in undisturbed.parent.parent.rglob("*") if path.is_file())
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", 4096) as made:
        yield made


def left_over(place: Path) -> list[str]:
    """Unfinished writes."""
    return [write.key for write in open_store(place.as_uri()).stale_writes(timedelta(0))]


def test_wherever_the_disk_is_full_the_next_run_ends_in_the_same_bytes(
    manifest: Path, undisturbed: Path, taken: int, disk: Disk
) -> None:
    """A disk that grows from run to run, by a tenth of what the job leaves, and by less near the end: it is full at the start,
    while workers compute and while the driver puts the artifact together."""
    job, said = job_of(manifest, f"spec.output.uri={disk.place.as_uri()}"), list[str]()
    for hundredths in (*range(10, 90, 10), *range(90, 101, 2)):
        disk.resize(taken * hundredths // 100)
        try:
            published = run_local(job, LocalPool(2))
        except SurroundingsError as error:
            said.append(str(error))
        else:
            break
        assert not left_over(disk.place)
        assert not list(disk.place.rglob(DOCUMENT))
    disk.resize(ROOM)
    published = run_local(job)
    assert files_of(local_path(published.uri)) == files_of(undisturbed)
    for text in said:
        assert len(text.splitlines()) == 1
        assert FULL in text
        assert str(disk.place) in text
    by_workers = [line for line in said if " after 3 tries: " in line]
    assert by_workers
    assert len(by_workers) < len(said), "the driver met it too"


def test_a_pull_that_fills_the_disk_goes_on_when_there_is_room(undisturbed: Path, taken: int, disk: Disk) -> None:
    disk.resize(taken // 8)
    destination = disk.place / "pulled"
    with pytest.raises(StorageError, match=f"{destination}.*{FULL}"):
        pull(undisturbed.as_uri(), destination)
    assert not list(disk.place.rglob(DOCUMENT))
    disk.resize(ROOM)
    pull(undisturbed.as_uri(), destination)
    assert files_of(destination) == files_of(undisturbed)
    assert verify(destination.as_uri())


@pytest.mark.end_to_end
def test_a_command_on_a_full_disk_ends_in_one_line(manifest: Path, undisturbed: Path, taken: int, disk: Disk) -> None:
    disk.resize(taken // 2)
    settings = ["--output", str(disk.place), "--set", "spec.resources={workers: 2, cpus_per_worker: 1}"]
    code, out, err = Run(manifest, *settings).finish()
    assert (code, out) == (4, ""), err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert FULL in line
    assert str(disk.place) in line
    assert "Traceback" not in err
    assert not left_over(disk.place)
    disk.resize(ROOM)
    code, out, err = Run(manifest, *settings).finish()
    assert code == 0, err
    assert files_of(local_path(out.strip())) == files_of(undisturbed)
