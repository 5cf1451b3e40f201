"""The commands for callers in Python: `counterweight.compress`, `plan`, `pull`, `verify`. `docs/python.md` shows them.

Paths may be relative to the working directory; URIs are `file:`, `s3:` and, of models, `hf:`. Errors are those of
`counterweight.workers.errors`, which say what exit code a command would have had.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

from counterweight.pipeline.manifest import CompressionJob, load_manifest, parse_manifest
from counterweight.pipeline.manifest.uris import from_here
from counterweight.pipeline.model_files import config_of, positions_of
from counterweight.pipeline.policies import Resume
from counterweight.pipeline.starter import WINDOW, job_name
from counterweight.workers.errors import RequestError
from counterweight.workers.process import importing

if TYPE_CHECKING:
    from counterweight.pipeline.artifact import ArtifactDocument, Published
    from counterweight.pipeline.plan import Plan

Place: TypeAlias = "str | os.PathLike[str]"
"""A path or a URI."""

Section: TypeAlias = "Mapping[str, object]"
"""A part of a manifest, as YAML would be read."""


def compress(
    job: CompressionJob | Section | Place,
    recipe: Section | None = None,
    *,
    calibration: Section | Place | None = None,
    validation: Section | Place | None = None,
    output: Place | None = None,
    address: str | None = None,
    show: TextIO | None = None,
) -> Published:
    """Compresses a model and publishes the artifact: `counterweight run`. Finished work of earlier calls is taken over.

    job: a manifest (its path or URI, its content as a mapping, or a `CompressionJob`); with a `recipe`, a model.
    recipe: `spec.recipe` of a manifest: `{"weights": {"bits": 4, "group_size": 128}}`.
    calibration, validation: these sections of `spec`, or the path or URI of a text; with a recipe only.
    output: where the artifact goes; replaces the manifest's.
    address: where the workers are, as `--address` of the command: none, local, auto, ray://host:port.
    show: where progress is shown, such as `sys.stderr`; None: nowhere.

    Returns where the artifact is (`uri`) and its artifact.json (`document`). Raises RequestError (the manifest, the model, the
    texts), GateError (a gate failed, nothing was published), SurroundingsError (storage or workers; a retry makes sense).
    """
    asked = job_of(job, recipe, calibration=calibration, validation=validation, output=output)
    from counterweight.pipeline.progress import Silent, make_progress
    from counterweight.pipeline.run import run_job

    with Silent() if show is None else make_progress(show) as progress:
        return run_job(asked, progress, address=address, resume=Resume.AUTO)


def plan(
    job: CompressionJob | Section | Place,
    recipe: Section | None = None,
    *,
    calibration: Section | Place | None = None,
    validation: Section | Place | None = None,
    output: Place | None = None,
    device: str | None = None,
) -> Plan:
    """What a job would do and need, from headers alone: `counterweight plan`. Arguments are those of `compress`.

    device: the workers' GPU, such as H100-80G, or a file of measured rates. Raises RequestError for what `compress` would
    refuse, and StorageError; what does not fit into memory is in the plan's `problems`.
    """
    asked = job_of(job, recipe, calibration=calibration, validation=validation, output=output)
    with importing():
        from counterweight.pipeline.foresight import foresee
    return foresee(asked, device).plan


def pull(uri: Place, destination: Place) -> ArtifactDocument:
    """Downloads an artifact into a folder, resuming what an earlier call left; every byte is checked. uri: of the artifact, or
    of a name for its latest. Raises RequestError, IntegrityError, StorageError."""
    from counterweight.pipeline.artifact import pull as fetch
    from counterweight.pipeline.artifact.hub import located

    return fetch(located(from_here(uri)), Path(destination))


def verify(uri: Place) -> ArtifactDocument:
    """Reads every byte of an artifact and compares it with its digest, and every tensor as `load_model` would. Raises
    IntegrityError, naming each file that differs, CheckpointError, RequestError, StorageError."""
    from counterweight.pipeline.artifact import verify as check
    from counterweight.pipeline.artifact.hub import located

    return check(located(from_here(uri)))


def job_of(
    job: CompressionJob | Section | Place,
    recipe: Section | None = None,
    *,
    calibration: Section | Place | None = None,
    validation: Section | Place | None = None,
    output: Place | None = None,
) -> CompressionJob:
    """The job that the arguments of `compress` describe, with absolute URIs. ManifestError, one line for each problem."""
    if recipe is not None:
        if isinstance(job, CompressionJob | Mapping):
            raise RequestError(f"a recipe with a {type(job).__name__}: expected the path or URI of a model")
        return _of_model(job, recipe, calibration, validation, output)
    if calibration is not None or validation is not None:
        raise RequestError("calibration and validation: expected a recipe with them: a manifest has its own")
    replaced = [] if output is None else [f"spec.output.uri={json.dumps(from_here(output))}"]
    if isinstance(job, CompressionJob | Mapping):
        content = job.model_dump(mode="json") if isinstance(job, CompressionJob) else job
        return _parsed(content, replaced)
    return load_manifest(os.fspath(job), replaced).job


def _of_model(
    model: Place,
    recipe: Section,
    calibration: Section | Place | None,
    validation: Section | Place | None,
    output: Place | None,
) -> CompressionJob:
    if calibration is None or output is None:
        missing = "calibration" if calibration is None else "output"
        raise RequestError(f"{missing}: expected with a recipe: a text to calibrate on and a place for the artifact")
    uri = from_here(model)
    spec: dict[str, object] = {"model": {"uri": uri}, "recipe": recipe, "output": {"uri": from_here(output)}}
    if isinstance(calibration, Mapping):
        spec["calibration"] = calibration
    else:
        spec["calibration"] = {
            "source": _text(calibration),
            "sequence_length": min(WINDOW, positions_of(config_of(uri)) or WINDOW),
        }
    if validation is not None:
        spec["validation"] = validation if isinstance(validation, Mapping) else {"text": _text(validation)}
    named = {"name": job_name(uri)}
    return _parsed({"apiVersion": "counterweight/v1", "kind": "CompressionJob", "metadata": named, "spec": spec}, [])


def _parsed(content: Section, overrides: list[str]) -> CompressionJob:
    text = json.dumps(content, default=str)
    return parse_manifest(text, name="manifest.json", base=Path.cwd().as_uri(), overrides=overrides).job


def _text(place: Place) -> Section:
    return {"kind": "text", "uri": from_here(place)}
