"""How long a job takes, on how many devices and how well it uses them: a plan's arithmetic and bytes, priced by rates and put
through the job's own graph and dispatcher on a simulated clock."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.pipeline.estimate.costs import BlockSeconds, again, block_seconds
from counterweight.pipeline.estimate.sharing import SharedSeconds
from counterweight.pipeline.estimate.timeline import (
    START,
    Costs,
    judged,
    timeline,
    window_tokens,
    windows_of_originals,
    windows_of_workers,
)
from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.manifest.job import Resources
from counterweight.pipeline.units import seconds_text
from counterweight.workers.config import Config

__all__ = [
    "BlockSeconds",
    "Costs",
    "Estimate",
    "SharedSeconds",
    "again",
    "block_seconds",
    "estimate",
    "judged",
    "reference_bytes",
    "validation_bytes",
]


SHOWN = 0.01
"""Share of the workers' time from which a step is named."""


class Estimate(Config):
    """How long a job takes. rates: where the figures behind it come from."""

    rates: str
    workers: int
    seconds: float
    """From the command to the published artifact."""
    gpu_hours: float
    """All workers' GPUs for as long; 0 on a CPU."""
    seconds_of_one: float
    """The same job on one worker."""
    stages: Mapping[str, float]
    """Stage -> seconds, one after the other."""
    idle: Mapping[str, float]
    """Stage -> seconds of all workers in which they have nothing to do."""
    steps: Mapping[str, float]
    """What workers do -> seconds of all workers."""

    @property
    def efficiency(self) -> float:
        """Seconds of one worker over those of all."""
        return self.seconds_of_one / (self.workers * self.seconds)

    @property
    def efficiency_started(self) -> float:
        """Likewise without what it takes until the workers answer, which no number of them shortens."""
        start = self.stages[START]
        return (self.seconds_of_one - start) / (self.workers * (self.seconds - start))

    @property
    def slowest(self) -> str:
        """The step that takes most of the workers' time, or `waiting`."""
        spent = {**self.steps, "waiting": sum(self.idle.values())}
        return max(spent, key=lambda name: spent[name])

    def rows(self) -> list[tuple[str, str]]:
        """For people: what it is, and what to read."""
        spent = {**self.steps, "waiting": sum(self.idle.values())}
        whole = sum(spent.values())
        stages = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in self.stages.items())
        shares = sorted(((seconds / whole, name) for name, seconds in spent.items()), reverse=True)
        hours = f", {self.gpu_hours:.2f} GPU-hours" if self.gpu_hours else ""
        rows = [
            ("time", f"{seconds_text(self.seconds)}{hours} ({stages})"),
            ("workers' time", ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= SHOWN)),
            ("rates", self.rates),
        ]
        if self.workers > 1:
            alone = seconds_text(self.seconds_of_one)
            started = f"{self.efficiency_started:.0%} after their start"
            rows.insert(
                1, ("efficiency", f"{self.efficiency:.0%} of {self.workers} workers, {started}: one takes {alone}")
            )
        return rows


def estimate(costs: Costs, of_one: Costs, resources: Resources, threads: int) -> Estimate:
    """Of a job on its workers, of so many threads each (1 on a GPU). of_one: what its tasks take where there is one worker, in
    whose memory hidden states stay."""
    workers = resources.workers
    found = timeline(costs, workers, threads)
    one = found if workers == 1 else timeline(of_one, 1, threads)
    return Estimate(
        rates=costs.rates.source,
        workers=workers,
        seconds=found.seconds,
        gpu_hours=found.seconds * workers * resources.gpus_per_worker / 3600,
        seconds_of_one=one.seconds,
        stages=found.stages,
        idle=found.idle,
        steps=found.steps,
    )


def reference_bytes(job: CompressionJob, hidden: int) -> int:
    """What the original makes of the windows of the validation, which is written by one task and read by another. hidden: width
    of the stream."""
    windows = sum(map(len, windows_of_workers(job, 1)))
    return windows * window_tokens(job) * hidden * judged(job)


def validation_bytes(job: CompressionJob, source: int, artifact: int) -> int:
    """What the tasks of the validation read of the original and of the artifact, of so many bytes."""
    workers, gpu = job.spec.resources.workers, job.spec.resources.gpus_per_worker > 0
    originals = windows_of_originals(job, workers, gpu=gpu)
    return len(originals) * source + len(windows_of_workers(job, workers)) * artifact
