"""Where a job's workers are: in forks of this process, on a Ray of the job's own, or on one that runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from counterweight.pipeline.cluster import embedded
from counterweight.pipeline.manifest import CompressionJob
from counterweight.workers.errors import RequestError

NONE, LOCAL = "none", "local"

FORKS = sys.platform == "linux"
"""Whether this system forks a process that has loaded torch, and ends the fork with its parent."""


@dataclass(frozen=True, slots=True)
class Place:
    """address: none for forks of this process, local for an embedded Ray, else a Ray that runs: auto or ray://host:port."""

    address: str

    @classmethod
    def of(cls, job: CompressionJob, address: str | None) -> Place:
        """Where an address says; without one, what is cheapest: forks for a single worker on a CPU, else an embedded Ray.
        RequestError where forks are asked for and cannot be."""
        resources = job.spec.resources
        if address is None:
            alone = resources.workers == 1 and resources.gpus_per_worker == 0
            return cls(NONE if alone and FORKS else LOCAL)
        if address == NONE and resources.gpus_per_worker > 0:
            raise RequestError(
                f"--address none: spec.resources.gpus_per_worker: {resources.gpus_per_worker:g}: expected 0: a process that "
                "uses a GPU cannot be forked; local starts Ray"
            )
        if address == NONE and not FORKS:
            raise RequestError(
                "--address none: expected Linux: elsewhere a process that has loaded torch cannot be forked"
            )
        return cls(address)

    @property
    def ray(self) -> bool:
        """Whether Ray runs the workers."""
        return self.address != NONE

    @property
    def here(self) -> bool:
        """Whether the workers are on this machine, and the job's own."""
        return not self.ray or embedded(self.address)
