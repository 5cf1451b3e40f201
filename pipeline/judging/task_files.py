"""Task files of the lm-evaluation-harness, read before a job begins: without torch, and without running anything in them."""

from __future__ import annotations

import json
import posixpath

import yaml
from pydantic import JsonValue, ValidationError

from counterweight.pipeline.manifest import Validation
from counterweight.pipeline.manifest.validation import HarnessTask
from counterweight.workers.config import first_problem
from counterweight.workers.errors import ObjectNotFoundError, RequestError
from counterweight.workers.harness import MISSING, Documents, TaskDocument, installed
from counterweight.workers.storage import ObjectStore, open_named

MAX_BYTES = 256 << 20
"""Of a task's file, and of each of its data files."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""Fields of a task's config that name a split."""


def read_documents(validation: Validation | None, model: ObjectStore) -> Documents | None:
    """The tasks of a manifest and the tokenizer of the model that they are asked of; None without tasks. RequestError for a
    task that is not there, runs code, or has no data beside it, and where the harness is not installed."""
    if validation is None or not validation.tasks:
        return None
    if not installed():
        raise RequestError(f"spec.validation.tasks: {MISSING}")
    tokenizer = {name: model.read(name).decode() for name in TOKENIZER_FILES if model.exists(name)}
    tasks = {name: _read(f"spec.validation.tasks.{name}.uri", task) for name, task in validation.tasks.items()}
    return Documents(tasks=tasks, tokenizer=tokenizer)


def _read(field: str, task: HarnessTask) -> TaskDocument:
    store, key = open_named(task.uri)
    try:
        config = yaml.safe_load(store.read_bounded(key, MAX_BYTES))
    except ObjectNotFoundError as error:
        raise RequestError(f"{field}: {task.uri}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:200]
        raise RequestError(f"{field}: {task.uri}: expected YAML without tags such as !function: {said}") from error
    if not isinstance(config, dict):
        raise RequestError(f"{field}: {task.uri}: expected the mapping of a task of the lm-evaluation-harness")
    settings = config.pop("dataset_kwargs", None)
    files = settings.get("data_files") if isinstance(settings, dict) else None
    for name in ("dataset_path", "dataset_name", "include", "task", "custom_dataset"):
        config.pop(name, None)
    if not isinstance(files, dict):
        raise RequestError(
            f"{field}: {task.uri}: dataset_kwargs.data_files: expected a mapping of splits to JSON files"
        )
    folder = posixpath.dirname(key)
    rows = {str(split): _rows(field, store, posixpath.join(folder, str(file))) for split, file in files.items()}
    missing = sorted({str(config[one]) for one in SPLITS if config.get(one) is not None} - rows.keys())
    if missing:
        raise RequestError(f"{field}: {task.uri}: dataset_kwargs.data_files: no file for the split {missing[0]!r}")
    try:
        return TaskDocument.model_validate(
            {"config": config, "rows": rows, "num_fewshot": task.num_fewshot, "limit": task.limit}
        )
    except ValidationError as error:
        raise RequestError(f"{field}: {task.uri}: {first_problem(error)}") from error


def _rows(field: str, store: ObjectStore, key: str) -> tuple[dict[str, JsonValue], ...]:
    """The items of a file: a list of JSON objects, or one a line."""
    key = posixpath.normpath(key)
    uri = store.uri_of(key) if not key.startswith("..") else key
    if key.startswith(("../", "/")) or not key.endswith((".json", ".jsonl")):
        raise RequestError(f"{field}: {uri}: expected a .json or .jsonl file beside the task's or below it")
    try:
        text = store.read_bounded(key, MAX_BYTES).decode()
        found = (
            json.loads(text)
            if key.endswith(".json")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ObjectNotFoundError as error:
        raise RequestError(f"{field}: {uri}: no such file") from error
    except ValueError as error:
        raise RequestError(f"{field}: {uri}: expected JSON: {error}") from error
    if not isinstance(found, list) or not found or not all(isinstance(row, dict) for row in found):
        raise RequestError(f"{field}: {uri}: expected JSON objects, one for each item")
    return tuple(found)
