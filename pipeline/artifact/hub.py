"""Artifacts on Hugging Face's hub: put there, and found there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from counterweight.pipeline.artifact.card import CARD, FOLDER, PLACE
from counterweight.pipeline.artifact.document import DOCUMENT, ArtifactDocument, FileEntry
from counterweight.pipeline.artifact.reader import read_document
from counterweight.pipeline.artifact.reader import resolve as find
from counterweight.pipeline.artifact.transfer import pull
from counterweight.pipeline.model_files import HUB, hub_answers, hub_name
from counterweight.workers.errors import IntegrityError, RequestError
from counterweight.workers.ledger import ADAPTER_CONFIG
from counterweight.workers.storage import open_store, sha256_hex
from counterweight.workers.storage.names import file_root

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


def push(
    uri: str, repository: str, *, private: bool = False, done: Callable[[str, int], None] = lambda *_: None
) -> str:
    """Uploads an artifact to a repository of the hub in one commit, and makes the repository where there is none; its URL.

    uri: of the artifact. repository: `hf:owner/name[@branch]`. Every byte is compared with its digest before anything is sent.
    The card and the adapter name the repository there, as transformers and PEFT want it; artifact.json has their digests.
    Raises RequestError for what is no artifact and for what the hub refuses, IntegrityError, StorageError.
    """
    if not repository.startswith(HUB):
        raise RequestError(f"{repository}: expected hf:owner/name, a repository of Hugging Face's hub")
    from huggingface_hub import HfApi

    name, branch = hub_name(repository)
    api = HfApi()
    with _local(uri) as (folder, document), hub_answers(repository, "repository"):
        changed = _renamed(folder, document, name)
        operations = list(_operations(folder, document, changed, done))
        url = api.create_repo(name, repo_type="model", private=private or None, exist_ok=True)
        api.create_commit(name, operations, commit_message=f"{document.name} {document.id}", revision=branch)
    return str(url)


def located(uri: str) -> str:
    """Where the artifact lies that `uri` names: that of a repository is downloaded first, those files alone that its
    artifact.json names. RequestError, CheckpointError, StorageError."""
    if not uri.startswith(HUB):
        return uri
    from huggingface_hub import hf_hub_download, snapshot_download

    name, revision = hub_name(uri)
    with hub_answers(uri, "artifact"):
        first = Path(hf_hub_download(name, DOCUMENT, revision=revision))
        document = read_document(open_store(first.parent.resolve().as_uri()))
        path = snapshot_download(name, revision=revision, allow_patterns=[DOCUMENT, *document.files])
    return Path(path).resolve().as_uri()


@contextmanager
def _local(uri: str) -> Iterator[tuple[Path, ArtifactDocument]]:
    """The artifact in a folder of this machine."""
    store, document = find(uri)
    root = file_root(store.uri)
    if root is not None:
        yield root, document
        return
    with tempfile.TemporaryDirectory(prefix="counterweight-push-") as folder:
        yield Path(folder), pull(uri, Path(folder))


def _renamed(folder: Path, document: ArtifactDocument, name: str) -> Mapping[str, bytes]:
    """Files in which the repository's name stands in the place of another."""
    changed: dict[str, bytes] = {}
    if CARD in document.files:
        card = (folder / CARD).read_text()
        changed[CARD] = card.replace(PLACE, f"{HUB}{name}").replace(FOLDER, name).encode()
    if ADAPTER_CONFIG in document.files:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        if "base_model_name_or_path" in config:  # not where PEFT is to refuse the adapter
            config["base_model_name_or_path"] = name
            changed[ADAPTER_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return changed


def _operations(
    folder: Path, document: ArtifactDocument, changed: Mapping[str, bytes], done: Callable[[str, int], None]
) -> Iterator[CommitOperationAdd]:
    """Every file, checked; artifact.json last."""
    from huggingface_hub import CommitOperationAdd

    files = dict(document.files)
    for path, entry in sorted(document.files.items()):
        _check(folder / path, entry)
        data = changed.get(path)
        if data is not None:
            files[path] = FileEntry(size=len(data), sha256=sha256_hex(data))
        yield CommitOperationAdd(path, data if data is not None else folder / path)
        done(path, files[path].size)
    written = document.model_copy(update={"files": files}).model_dump_json(indent=1).encode()
    yield CommitOperationAdd(DOCUMENT, written)


def _check(path: Path, entry: FileEntry) -> None:
    import hashlib

    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != entry.sha256:
        raise IntegrityError(f"{path}: sha256 {actual}, expected {entry.sha256}: nothing was uploaded")
