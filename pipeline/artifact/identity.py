"""What an artifact is called by: a digest of all that determines its bytes and figures."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from counterweight.pipeline.manifest import TEXT, CompressionJob, canonical
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.resume import setting_of
from counterweight.pipeline.tokens import Tokens
from counterweight.workers.harness import Documents
from counterweight.workers.keys import digest, versions
from counterweight.workers.tasks.setting import Device

SOFTWARE = ("counterweight", "torch", "transformers", "ray", "safetensors", "pydantic")


def artifact_id(
    job: CompressionJob,
    source: ModelSource,
    device: Device,
    digests: Mapping[str, str],
    tokens: Tokens,
    tasks: Documents | None,
) -> str:
    """The id of a job's artifact: of everything that determines its bytes and its figures. digests: source tensor -> sha256.
    tasks: that the model is judged by."""
    texts = {name: windows.digest for name, windows in tokens.validation.items()}
    everything: dict[str, object] = {
        "job": canonical(job).decode(),
        "setting": setting_of(job, source, device).determines(),
        "versions": versions((job.spec.recipe, job.spec.distillation)),
        "software": software(),
        "tensors": dict(digests),
        "calibration": tokens.calibration.digest,
        "validation": texts.pop(TEXT, None),
    }
    if texts:
        everything["texts"] = texts
    if tokens.unseen is not None:
        everything["held_out"] = tokens.unseen.digest
    if tasks is not None:
        everything["tasks"] = tasks.model_dump(mode="json")
    if tokens.drawn is not None:
        everything["drawn"] = tokens.drawn.digest
    if source.layout.experts:
        everything["experts"] = versions(job.spec.calibration.experts)
    if job.spec.distillation is not None:
        everything["distillation"] = [text.digest for text in (*tokens.trained, *tokens.held_out)]
    return digest(everything)[:16]


def software() -> dict[str, str]:
    """Versions of what made the artifact."""
    return {name: metadata.version(name) for name in SOFTWARE}
