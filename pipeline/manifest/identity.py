"""The identity of a job: what makes two manifests one."""

from __future__ import annotations

from counterweight.pipeline.manifest.job import CompressionJob
from counterweight.workers.keys import digest


def job_id(job: CompressionJob) -> str:
    """Of the manifest, with every default written out: the same job submitted again has the same."""
    return digest([job.metadata.name, job.spec.model_dump(mode="json")])[:16]
