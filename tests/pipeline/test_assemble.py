"""What an artifact consists of, and that it appears whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from counterweight.pipeline.artifact import DOCUMENT, LATEST, Artifact, read_document, resolve, verify
from counterweight.pipeline.artifact.assemble import Parts
from counterweight.pipeline.artifact.card import CARD
from counterweight.pipeline.artifact.publish import publish
from counterweight.pipeline.artifact.report import Report
from counterweight.workers.checkpoint.beside import SideFile
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.errors import GateError, IntegrityError
from counterweight.workers.ledger import LEDGER, Ledger
from counterweight.workers.storage import open_store
from counterweight.workers.storage.base import Writer
from counterweight.workers.storage.file import FileStore
from tests.models import build, read_tensors, save, save_fused
from tests.pipeline.tiny import Events, LocalPool, files_of, job_of, local_path, run_local, write_job


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"), layers=2)


@pytest.fixture(scope="module")
def root(manifest: Path) -> Path:
    """The directory of an artifact, never changed."""
    return local_path(run_local(job_of(manifest)).uri)


def ledger_of(root: Path) -> Ledger:
    return Ledger.model_validate_json((root / "ledger.json").read_bytes())


def test_every_source_tensor_stands_in_the_ledger_once(root: Path, manifest: Path) -> None:
    source = read_tensors(manifest.parent / "model")
    ledger = ledger_of(root)
    assert Counter(entry.source for entry in ledger.entries) == Counter(source.keys())
    for entry in ledger.entries:
        assert entry.shape == tuple(source[entry.source].shape)
        quantized = "_proj." in entry.source
        assert entry.fate == ("quantized" if quantized else "kept")
        assert len(entry.stored_as) == (3 if quantized else 1)


def test_every_stored_tensor_stands_in_the_ledger_with_its_digest(root: Path) -> None:
    stored = read_tensors(root) | read_tensors(root / "compensation")
    assert ledger_of(root).tensors == {name: tensor_digest(tensor) for name, tensor in stored.items()}
    named = {name for entry in ledger_of(root).entries for name in entry.stored_as}
    assert named == {name for name in stored if "lora_" not in name}


def test_what_is_kept_is_kept_to_the_last_bit(root: Path, manifest: Path) -> None:
    source, stored = read_tensors(manifest.parent / "model"), read_tensors(root)
    kept = [entry.source for entry in ledger_of(root).entries if entry.fate == "kept"]
    assert len(kept) == 7
    for name in kept:
        assert tensor_digest(stored[name]) == tensor_digest(source[name])


def test_the_index_says_where_each_tensor_is(root: Path) -> None:
    index = json.loads((root / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for path in root.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert not set(file.keys()) & found.keys()
            found |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == found
    shards = sorted(set(found.values()))
    assert shards == [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]


def test_the_tokenizer_and_generation_settings_go_along_unchanged(root: Path, manifest: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (root / name).read_bytes() == (manifest.parent / "model" / name).read_bytes()


def test_every_file_beside_the_weights_is_carried_over_or_named_in_the_ledger(tmp_path: Path) -> None:
    manifest = write_job(tmp_path, layers=1)
    model = tmp_path / "model"
    for name in ("LICENSE", "README.md", "vocab.txt", "chat_template.json", "modeling_own.py"):
        (model / name).write_text(f'"{name}"')
    root = local_path(run_local(job_of(manifest, "spec.validation=")).uri)
    ledger = Ledger.model_validate_json((root / LEDGER).read_bytes())
    fates = {entry.name: entry.fate for entry in ledger.files}
    weights = {"config.json", "model.safetensors"}
    assert set(fates) == {path.name for path in model.iterdir()} - weights
    for name, fate in fates.items():
        assert (root / name).exists() == (fate == "carried" or name == CARD)
        if fate == "carried":
            assert (root / name).read_bytes() == (model / name).read_bytes()
    assert fates["LICENSE"] == fates["vocab.txt"] == "carried"
    assert fates["README.md"] == fates["modeling_own.py"] == "left out"


def test_a_job_without_branches_has_no_adapter(manifest: Path, tmp_path: Path) -> None:
    job = job_of(manifest, f"spec.output.uri={tmp_path}", "spec.recipe.compensation={kind: none}", "spec.validation=")
    assert not (local_path(run_local(job).uri) / "compensation").exists()


def test_a_tied_head_that_is_stored_and_old_frequencies_are_dropped_with_a_reason(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    manifest = write_job(tmp_path)
    model = tmp_path / "model"
    save(build("llama-tied-biased"), model, torch.bfloat16)
    tensors = read_tensors(model)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file({**tensors, **extra}, model / "model.safetensors", metadata={"format": "pt"})
    ledger = ledger_of(local_path(run_local(job_of(manifest)).uri))
    dropped = {entry.source: entry for entry in ledger.entries if entry.fate == "dropped"}
    assert dropped.keys() == extra.keys()
    for name, entry in dropped.items():
        assert entry.stored_as == ()
        assert entry.reason
        assert entry.shape == tuple(extra[name].shape)
    assert "lm_head.weight" not in ledger.tensors


def test_fused_experts_are_accounted_for(tmp_path: Path) -> None:
    manifest = write_job(tmp_path, manifest=MIXTRAL)
    save_fused(build("mixtral", num_hidden_layers=1), tmp_path / "model")
    root = local_path(run_local(job_of(manifest)).uri)
    ledger = ledger_of(root)
    assert {entry.source for entry in ledger.entries} == set(read_tensors(tmp_path / "model"))
    fused = [entry for entry in ledger.entries if entry.source.endswith("experts.gate_up_proj")]
    assert len(fused) == 8  # two projections of four experts
    assert all(entry.fate == "quantized" for entry in fused)


MIXTRAL = """\
apiVersion: counterweight/v1
kind: CompressionJob
metadata: {name: tiny}
spec:
  model: {uri: model}
  calibration: {source: {uri: calibration.txt}, sequences: 12, sequence_length: 32}
  recipe: {weights: {bits: 4, group_size: 32}}
  output: {uri: out}
"""


def test_a_source_tensor_that_nobody_accounted_for_is_an_error(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Parts.ledger

    def forgetful(parts: Parts, files: Sequence[SideFile] = ()) -> Ledger:
        ledger = whole(parts, files)
        entries = tuple(entry for entry in ledger.entries if entry.source != "model.norm.weight")
        return ledger.model_copy(update={"entries": entries})

    monkeypatch.setattr(Parts, "ledger", forgetful)
    with pytest.raises(IntegrityError, match=r"1 source tensors are not accounted for: model\.norm\.weight"):
        run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    assert not list(tmp_path.rglob(DOCUMENT))


# -- publication ----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The driver's process is gone: nothing may catch it."""


class CrashingStore(FileStore):
    """The driver's store: remembers what it did, and lets the driver die before or after its `fatal`-th change."""

    def __init__(self, root: Path, fatal: int | None = None, *, after: bool = False) -> None:
        super().__init__(root)
        self.changes: list[tuple[str, str]] = []
        self._fatal, self._after = fatal, after

    def _at(self, operation: str, key: str, change: Callable[[], Any]) -> Any:
        self.changes.append((operation, key))
        dies = len(self.changes) == self._fatal
        if dies and not self._after:
            raise Crash
        value = change()
        if dies:
            raise Crash
        return value

    def open_writer(self, key: str, *, durable: bool = True, sha256: str | None = None) -> Writer:
        """Every write of an artifact's file goes through one; it happens when it is committed."""
        writer = super().open_writer(key, durable=durable, sha256=sha256)
        if not key.startswith("_work/"):
            writer.commit = partial(self._at, "write", key, writer.commit)  # type: ignore[method-assign]
        return writer

    def create(self, key: str, data: bytes) -> bool:
        return bool(self._at("create", key, partial(super().create, key, data)))

    def copy(self, source_key: str, key: str) -> None:
        self._at("copy", key, partial(super().copy, source_key, key))

    def delete(self, key: str) -> None:
        self._at("delete", key, partial(super().delete, key))


def test_the_document_is_written_behind_its_files_and_the_pointer_last(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CrashingStore(tmp_path)
    monkeypatch.setattr("counterweight.pipeline.orchestrator.open_store", lambda uri: store)
    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    prefix = f"tiny/{published.document.id}/"
    names = [key.removeprefix(prefix) for _, key in store.changes]
    end = names.index(f"tiny/{LATEST}")
    files, (document, pointer), discarded = names[: end - 1], names[end - 1 : end + 1], names[end + 1 :]
    assert document == DOCUMENT
    assert pointer == f"tiny/{LATEST}"
    assert files[-3:] == ["report/report.json", "report/report.html", "README.md"]
    # What holds tensors is the workers' to write.
    assert set(files) == {path for path in published.document.files if not path.endswith(".safetensors")}
    # Hidden states behind the blocks are thrown away when the artifact is visible.
    assert discarded
    assert [operation for operation, _ in store.changes if operation == "delete"] == ["delete"] * len(discarded)


def test_a_driver_that_dies_at_any_write_leaves_nothing_half_visible_and_the_next_ends_in_the_same_bytes(
    manifest: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files_of(root)
    fatal = 0
    while True:
        fatal += 1
        store = CrashingStore(tmp_path, fatal, after=fatal % 2 == 0)
        monkeypatch.setattr("counterweight.pipeline.orchestrator.open_store", lambda uri, store=store: store)
        try:
            run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
        except Crash:
            documents = list(tmp_path.glob(f"tiny/*/{DOCUMENT}"))
            for document in documents:
                assert files_of(document.parent) == expected
                verify(document.parent.as_uri())
            if (tmp_path / "tiny" / LATEST).exists():
                assert resolve((tmp_path / "tiny").as_uri())[1].id == root.name
            if documents:
                break
        else:
            break
    assert fatal > 11, "every write of the driver was to be tried"
    monkeypatch.undo()
    published = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    assert files_of(local_path(published.uri)) == expected
    assert verify((tmp_path / "tiny").as_uri()).id == root.name


def test_a_pointer_that_was_never_written_is_written_by_the_next_run(manifest: Path, tmp_path: Path) -> None:
    job = job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation=")
    first = run_local(job)
    (tmp_path / "tiny" / LATEST).unlink()
    again = run_local(job)
    assert again.existing
    assert not first.existing
    assert resolve((tmp_path / "tiny").as_uri())[1] == first.document


def test_a_run_that_finds_an_older_artifact_does_not_turn_the_pointer_back(manifest: Path, tmp_path: Path) -> None:
    older = job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation=")
    run_local(older)
    newer = run_local(job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation=", "spec.calibration.seed=1"))
    pointer = tmp_path / "tiny" / LATEST
    later = {**json.loads(pointer.read_text()), "created": "2999-01-01T00:00:00+00:00"}
    pointer.write_text(json.dumps(later))
    assert run_local(older).existing
    assert resolve((tmp_path / "tiny").as_uri())[1].id == newer.document.id


def test_a_driver_that_comes_long_after_another_has_published_does_not_turn_it_back_either(
    manifest: Path, tmp_path: Path
) -> None:
    """As one does that was frozen before it published."""
    older = run_local(job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation="))
    newer = run_local(job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation=", "spec.calibration.seed=1"))
    root = local_path(older.uri)
    report = Report.model_validate_json((root / "report" / "report.json").read_bytes())
    files = {path: entry for path, entry in older.document.files.items() if not path.startswith("report/")}
    artifact = Artifact(open_store(tmp_path.as_uri()), "tiny", older.document.id)
    assert publish(artifact, report, files, ledger_of(root)).document == older.document
    assert resolve((tmp_path / "tiny").as_uri())[1] == newer.document


@pytest.mark.parametrize(("path", "said"), [("report/report.json", "not a report: "), ("config.json", "sha256")])
def test_what_is_read_back_to_be_published_and_is_damaged_is_no_wrong_request(
    path: str, said: str, manifest: Path, tmp_path: Path
) -> None:
    made = run_local(job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation="))
    root = local_path(made.uri)
    report = Report.model_validate_json((root / "report" / "report.json").read_bytes())
    files = {name: entry for name, entry in made.document.files.items() if not name.startswith("report/")}
    (root / path).write_bytes((root / path).read_bytes().replace(b'":', b'" ', 1))
    with pytest.raises(IntegrityError, match=said):
        publish(Artifact(open_store(tmp_path.as_uri()), "tiny", made.document.id), report, files, ledger_of(root))


def test_two_writers_never_mix_their_reports(manifest: Path, tmp_path: Path) -> None:
    """Whoever finds a report there takes it over, times and all."""
    job = job_of(manifest, f"spec.output.uri={tmp_path}")
    root = local_path(run_local(job).uri)
    report, page = ((root / "report" / name).read_bytes() for name in ("report.json", "report.html"))
    document = (root / DOCUMENT).read_bytes()
    (root / DOCUMENT).unlink()
    run_local(job)
    assert (root / "report" / "report.json").read_bytes() == report
    assert (root / "report" / "report.html").read_bytes() == page
    assert (root / DOCUMENT).read_bytes() == document


def test_an_artifact_of_another_job_is_another_directory(manifest: Path, tmp_path: Path) -> None:
    ids = set()
    for changes in ([], ["spec.calibration.seed=1"], ["spec.recipe.weights.bits=3"], ["spec.validation.gates.kl=100"]):
        ids.add(run_local(job_of(manifest, f"spec.output.uri={tmp_path}", *changes)).document.id)
    assert len(ids) == 4
    # Where a job runs, and how it is called, is no part of what it is.
    same = job_of(manifest, f"spec.output.uri={tmp_path}", "metadata.labels={team: a}", "spec.resources.workers=2")
    assert run_local(same, LocalPool(2)).existing


def test_a_gate_that_fails_removes_the_files_and_never_those_of_others(manifest: Path, tmp_path: Path) -> None:
    good = run_local(job_of(manifest, f"spec.output.uri={tmp_path}"))
    with pytest.raises(GateError):
        run_local(job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation.gates.kl=1e-9"))
    assert [path.name for path in (tmp_path / "tiny").iterdir() if path.is_dir()] == [good.document.id]
    assert verify((tmp_path / "tiny").as_uri()) == good.document


def test_a_second_attempt_at_a_failed_gate_reuses_every_block(manifest: Path, tmp_path: Path) -> None:
    job = job_of(manifest, f"spec.output.uri={tmp_path}", "spec.validation.gates.kl=1e-9")
    with pytest.raises(GateError):
        run_local(job)
    events = Events()
    with pytest.raises(GateError):
        run_local(job, progress=events)
    assert events.named("block_done") == [(0, True), (1, True)]


def test_the_published_document_is_what_a_reader_finds(root: Path, manifest: Path) -> None:
    found = run_local(job_of(manifest))
    assert found.existing
    assert found.document == read_document(open_store(root.as_uri()))
