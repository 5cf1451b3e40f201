"""The manifest: what a user asks for, typed, checked at the border, published as a JSON Schema."""

from counterweight.pipeline.manifest.calibration import Calibration
from counterweight.pipeline.manifest.job import (
    CompressionJob,
    Gates,
    JobSpec,
    Metadata,
    Model,
    Output,
    Resources,
    Validation,
    canonical,
)
from counterweight.pipeline.manifest.load import LoadedManifest, load_manifest, parse_manifest
from counterweight.pipeline.manifest.schema import job_schema, schema_text
from counterweight.pipeline.manifest.uris import resolve_uri

__all__ = [
    "Calibration",
    "CompressionJob",
    "Gates",
    "JobSpec",
    "LoadedManifest",
    "Metadata",
    "Model",
    "Output",
    "Resources",
    "Validation",
    "canonical",
    "job_schema",
    "load_manifest",
    "parse_manifest",
    "resolve_uri",
    "schema_text",
]
