"""The reader's side of an artifact: find, verify, pull."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from counterweight.pipeline.artifact import (
    DOCUMENT,
    LATEST,
    Artifact,
    ArtifactDocument,
    open_artifact,
    pull,
    read_document,
    resolve,
    verify,
)
from counterweight.workers.errors import (
    CheckpointError,
    IntegrityError,
    ObjectNotFoundError,
    RequestError,
    StorageError,
)
from counterweight.workers.storage import open_store, sha256_hex
from tests.pipeline.tiny import files_of, job_of, local_path, run_local, write_job


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an artifact, never changed."""
    manifest = write_job(tmp_path_factory.mktemp("job"), layers=2)
    return local_path(run_local(job_of(manifest)).uri)


@pytest.fixture
def artifact(published: Path, tmp_path: Path) -> Path:
    """A copy below its name, to be spoiled."""
    root = tmp_path / "out" / "tiny"
    shutil.copytree(published, root / published.name)
    shutil.copy(published.parent / LATEST, root / LATEST)
    return root / published.name


def test_the_document_names_every_file_with_its_size_and_digest(published: Path) -> None:
    document = read_document(open_store(published.as_uri()))
    stored = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert set(document.files) == stored - {DOCUMENT}
    for name, entry in document.files.items():
        data = (published / name).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), sha256_hex(data))
    assert {"config.json", "ledger.json", "report/report.json", "report/report.html", "tokenizer.json"} <= stored
    assert (document.name, document.id) == ("tiny", published.name)
    assert document.ledger.model_dump() == {"quantized": 14, "kept": 7, "dropped": 0}


def test_a_whole_artifact_verifies_by_its_root_and_by_its_name(published: Path) -> None:
    seen: dict[str, int] = {}
    document = verify(published.as_uri(), seen.__setitem__)
    assert seen == {name: entry.size for name, entry in document.files.items()}
    assert verify(published.parent.as_uri()) == document
    assert verify(f"{published.parent.as_uri()}/") == document


def test_every_difference_is_listed(artifact: Path) -> None:
    shards = sorted(artifact.glob("model-*.safetensors"))
    flipped = bytearray(shards[1].read_bytes())
    flipped[-3] ^= 4
    shards[1].write_bytes(flipped)
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    (artifact / "compensation" / "adapter_model.safetensors").unlink()
    (artifact / "config.json").write_bytes((artifact / "config.json").read_bytes() + b" ")
    with pytest.raises(IntegrityError) as caught:
        verify(artifact.as_uri())
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "4 of " in lines[0]
    text = "\n".join(lines)
    assert "compensation/adapter_model.safetensors: missing" in text
    assert f"{shards[1].name}: sha256 {sha256_hex(bytes(flipped))}, expected " in text
    size = shards[0].stat().st_size
    assert f"{shards[0].name}: {size} bytes, expected {size + 1}" in text
    assert "config.json: " in text


@pytest.mark.parametrize("name", ["config.json", "ledger.json", "model.safetensors.index.json"])
def test_one_changed_digit_in_what_says_how_to_read_is_found_before_anything_is_read(artifact: Path, name: str) -> None:
    """Tensors are verified by the ledger; a changed config or ledger would be another model in silence."""
    data = bytearray((artifact / name).read_bytes())
    position = next(index for index in range(len(data) - 1, -1, -1) if chr(data[index]) in "12345678")
    data[position] += 1
    (artifact / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        open_artifact(artifact.as_uri())


def test_a_directory_without_its_document_is_no_artifact(artifact: Path) -> None:
    (artifact / DOCUMENT).unlink()
    store = open_store(artifact.parent.parent.as_uri())
    assert Artifact(store, "tiny", artifact.name).published() is None
    with pytest.raises(ObjectNotFoundError):
        read_document(open_store(artifact.as_uri()))
    for uri in (artifact.as_uri(), artifact.parent.as_uri()):
        with pytest.raises(RequestError, match=r"artifact\.json"):
            resolve(uri)


def test_a_document_of_ours_that_is_damaged_is_no_wrong_request(artifact: Path) -> None:
    """Who asks by a job's own name and id expects what a run of it wrote; a URI may be anything."""
    (artifact / DOCUMENT).write_bytes((artifact / DOCUMENT).read_bytes().replace(b'",', b'" ', 1))
    store = open_store(artifact.parent.parent.as_uri())
    with pytest.raises(
        IntegrityError, match=r"artifact\.json: not an artifact's: .*: expected the document that a run"
    ):
        Artifact(store, "tiny", artifact.name).published()
    with pytest.raises(CheckpointError, match=r"artifact\.json: not an artifact's: "):
        resolve(artifact.as_uri())


def test_a_document_that_is_a_directory_is_no_document(artifact: Path) -> None:
    (artifact / DOCUMENT).unlink()
    (artifact / DOCUMENT).mkdir()
    with pytest.raises(RequestError, match=r"artifact\.json"):
        resolve(artifact.as_uri())


def test_pull_copies_everything_and_the_document_last(published: Path, tmp_path: Path) -> None:
    destination = tmp_path / "new" / "place"
    order: list[str] = []

    def done(path: str, _: int) -> None:
        assert not (destination / DOCUMENT).exists()
        order.append(path)

    document = pull(published.as_uri(), destination, done)
    assert set(order) == set(document.files)
    assert files_of(destination) == files_of(published)
    assert (destination / DOCUMENT).read_bytes() == (published / DOCUMENT).read_bytes()
    assert verify(destination.as_uri()) == document
    assert not list(destination.rglob("*.partial"))


def test_pull_into_a_relative_place(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pull(published.as_uri(), Path("here"))
    assert verify((tmp_path / "here").as_uri()).name == "tiny"


def test_pull_goes_on_where_an_earlier_one_stopped(published: Path, tmp_path: Path) -> None:
    destination = tmp_path / "pulled"
    pull(published.as_uri(), destination)
    names = sorted(path.name for path in destination.glob("model-*.safetensors"))
    whole = (destination / names[0]).read_bytes()
    (destination / f"{names[0]}.partial").write_bytes(whole[: len(whole) // 2])
    (destination / names[0]).unlink()
    (destination / DOCUMENT).unlink()
    kept = destination / names[1]
    before = kept.stat().st_mtime_ns
    pull(published.as_uri(), destination)
    assert kept.stat().st_mtime_ns == before, "a file that was whole was fetched again"
    assert files_of(destination) == files_of(published)


def test_pull_mends_what_was_changed_since(published: Path, tmp_path: Path) -> None:
    destination = tmp_path / "pulled"
    pull(published.as_uri(), destination)
    (destination / "config.json").write_text("{}")
    pull(published.as_uri(), destination)
    assert files_of(destination) == files_of(published)


def test_pull_of_a_damaged_artifact_fails_and_is_not_whole(artifact: Path, tmp_path: Path) -> None:
    shard = sorted(artifact.glob("model-*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    destination = tmp_path / "pulled"
    with pytest.raises(IntegrityError, match=shard.name):
        pull(artifact.as_uri(), destination)
    assert not (destination / DOCUMENT).exists()
    assert not (destination / shard.name).exists()


def test_pull_of_an_artifact_that_lacks_a_file(artifact: Path, tmp_path: Path) -> None:
    (artifact / "ledger.json").unlink()
    with pytest.raises(StorageError, match=r"ledger\.json"):
        pull(artifact.as_uri(), tmp_path / "pulled")
    assert not (tmp_path / "pulled" / DOCUMENT).exists()


def test_another_artifact_over_an_old_one_is_never_half_and_whole(
    artifact: Path, published: Path, tmp_path: Path
) -> None:
    """While its files are being replaced, the old document must not vouch for them."""
    destination = tmp_path / "pulled"
    pull(published.as_uri(), destination)
    document = json.loads((artifact / DOCUMENT).read_text())
    document["files"]["tokenizer_config.json"] = {"size": 2, "sha256": sha256_hex(b"{}")}
    (artifact / DOCUMENT).write_text(json.dumps(document))
    (artifact / "tokenizer_config.json").unlink()  # the pull breaks off in the middle
    with pytest.raises(StorageError):
        pull(artifact.as_uri(), destination)
    assert not (destination / DOCUMENT).exists()


def test_a_place_that_cannot_be_written_is_a_wrong_request(published: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="file"):
        pull(published.as_uri(), tmp_path / "file" / "below")


def test_latest_follows_the_newest(published: Path, artifact: Path) -> None:
    document = json.loads((artifact / DOCUMENT).read_text())
    other = artifact.parent / ("0" * 16)
    shutil.copytree(artifact, other)
    (other / DOCUMENT).write_text(json.dumps({**document, "id": other.name}))
    assert resolve(artifact.parent.as_uri())[1].id == artifact.name
    (artifact.parent / LATEST).write_text(json.dumps({"id": other.name}))
    store, found = resolve(artifact.parent.as_uri())
    assert found.id == other.name
    assert store.uri == other.as_uri()


def test_latest_that_names_what_is_gone(artifact: Path) -> None:
    (artifact / DOCUMENT).unlink()
    with pytest.raises(RequestError, match=f"names {artifact.name}, which has no artifact.json"):
        resolve(artifact.parent.as_uri())


def test_a_document_of_a_later_schema_is_refused(artifact: Path) -> None:
    document = json.loads((artifact / DOCUMENT).read_text())
    (artifact / DOCUMENT).write_text(json.dumps({**document, "schema_version": 2}))
    with pytest.raises(CheckpointError, match="schema_version"):
        read_document(open_store(artifact.as_uri()))


def test_the_document_reads_back_as_it_was_written(published: Path) -> None:
    text = (published / DOCUMENT).read_bytes()
    assert ArtifactDocument.model_validate_json(text).model_dump_json(indent=1).encode() == text
