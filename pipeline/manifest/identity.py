"""The identity of a job: what makes two manifests one."""

from __future__ import annotations

from counterweight.pipeline.manifest.job import CompressionJob
from counterweight.workers.keys import digest


def job_id(job: CompressionJob) -> str:
    """Of the manifest, with every default written out: the same job submitted again has the same."""
    return digest([job.metadata.name, job.spec.model_dump(mode="json")])[:16]


def calibration_id(job: CompressionJob) -> str | None:
    """Of what jobs have in common whose blocks can be compressed from one calibration, as far as manifests tell: everything but
    their branches, and the output, where they find each other's work. None for a job whose statistics are its own."""
    recipe = job.spec.recipe
    rank = recipe.compensation.branch_rank
    budget = rank is not None and rank.budget is not None
    if job.spec.calibration.propagate != "original" or recipe.tuning is not None or budget:
        return None
    spec = job.spec.model_dump(mode="json", include={"model", "calibration", "recipe", "output"})
    spec["recipe"]["compensation"] = recipe.compensation.gathers()
    return digest(spec)[:16]
