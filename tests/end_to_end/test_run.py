"""`counterweight run` as a user starts it: a process, an embedded Ray, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from counterweight.pipeline.artifact import DOCUMENT, LATEST, verify
from counterweight.pipeline.evaluate import evaluate_artifact
from tests.pipeline.tiny import Run, files_of, job_of, local_path, run_local, write_job

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def first(manifest: Path) -> tuple[int, str, str]:
    """The first run of the job, to its end: exit code, stdout, stderr."""
    return Run(manifest).finish()


def test_it_ends_with_the_uri_of_a_whole_artifact(first: tuple[int, str, str], manifest: Path) -> None:
    code, out, err = first
    assert code == 0, err
    (uri,) = out.splitlines()
    root = local_path(uri)
    assert root.parent == manifest.parent / "out" / "tiny"
    document = verify(uri)
    assert verify(root.parent.as_uri()) == document
    assert json.loads((root.parent / LATEST).read_text())["id"] == document.id == root.name
    assert "block 2 done (3/3)" in err
    assert "Traceback" not in err


def test_its_bytes_are_those_of_workers_in_one_process(
    first: tuple[int, str, str], manifest: Path, tmp_path: Path
) -> None:
    """Processes, threads and Ray leave no trace in an artifact, nor in its figures."""
    here = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    there = verify(first[1].strip())
    assert here.document.id == there.id
    assert files_of(local_path(here.uri)) == files_of(local_path(first[1].strip()))
    assert (here.document.baseline, here.document.compensated) == (there.baseline, there.compensated)
    assert evaluate_artifact(first[1].strip())["text"].compensated == there.compensated


def test_a_second_run_does_nothing_again(first: tuple[int, str, str], manifest: Path) -> None:
    root = local_path(first[1].strip())
    before = {path: path.stat().st_mtime_ns for path in root.parent.rglob("*")}
    commits = sorted((manifest.parent / "out" / "_work" / "commits").rglob("*.json"))
    code, out, err = Run(manifest).finish()
    assert code == 0, err
    assert out == first[1]
    assert "already published: all 3 blocks are reused" in err
    assert "stage blocks" not in err
    assert {path: path.stat().st_mtime_ns for path in root.parent.rglob("*")} == before
    assert sorted((manifest.parent / "out" / "_work" / "commits").rglob("*.json")) == commits


def test_nothing_but_the_artifact_and_durable_work_is_left(first: tuple[int, str, str], manifest: Path) -> None:
    assert first[0] == 0
    output = manifest.parent / "out"
    assert sorted(path.name for path in output.iterdir()) == ["_work", "tiny"]
    document = verify(first[1].strip())
    stored = {
        path.relative_to(local_path(first[1].strip())).as_posix() for path in local_path(first[1].strip()).rglob("*")
    }
    files = {name for name in stored if "." in name}
    assert files == {DOCUMENT, *document.files}
    # Hidden states are thrown away: what stays are block shards, factors, kept tensors, tokens, the embedding's output (of what
    # is solved on and of what is held out), and what the original made of the validation, for another recipe.
    blobs = list((output / "_work" / "blobs").iterdir())
    assert len(blobs) == 3 + 3 + 2 + 2 + 2 + 1
