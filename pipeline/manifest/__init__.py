"""The manifest: what a user asks for, typed, checked at the border, published as a JSON Schema."""

from counterweight.pipeline.manifest.batch import CompressionBatch
from counterweight.pipeline.manifest.calibration import Calibration
from counterweight.pipeline.manifest.identity import calibration_id, job_id
from counterweight.pipeline.manifest.job import (
    CompressionJob,
    JobSpec,
    Metadata,
    Model,
    Output,
    Resources,
    canonical,
)
from counterweight.pipeline.manifest.load import LoadedManifest, load_manifest, parse_manifest
from counterweight.pipeline.manifest.schema import batch_schema, job_schema, schema_text
from counterweight.pipeline.manifest.submission import Submission, SubmittedJob, load_submission, parse_bundle
from counterweight.pipeline.manifest.uris import from_here, named_uris, resolve_uri
from counterweight.pipeline.manifest.validation import TEXT, FurtherText, Gates, Validation

__all__ = [
    "Calibration",
    "CompressionBatch",
    "CompressionJob",
    "FurtherText",
    "Gates",
    "JobSpec",
    "LoadedManifest",
    "Metadata",
    "Model",
    "Output",
    "Resources",
    "Submission",
    "SubmittedJob",
    "TEXT",
    "Validation",
    "batch_schema",
    "calibration_id",
    "canonical",
    "from_here",
    "job_id",
    "job_schema",
    "load_manifest",
    "load_submission",
    "named_uris",
    "parse_bundle",
    "parse_manifest",
    "resolve_uri",
    "schema_text",
]
