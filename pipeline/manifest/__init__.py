"""The manifest: what a user asks for, typed, checked at the border, published as a JSON Schema."""

from pipeline.manifest.job import (
    Calibration,
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
from pipeline.manifest.load import LoadedManifest, load_manifest, parse_manifest
from pipeline.manifest.schema import job_schema, schema_text
from pipeline.manifest.uris import resolve_uri

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
