"""Parts of a report beyond figures on text: bounds and whether they are kept, tasks, samples."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.config import Config


class GateReport(Config):
    """A bound and what was measured. field: where it stands in the manifest. text: on which, or the task. measured: what is
    bounded, that is the metric, its multiple of the original's, or how much worse it is. limit: the largest value allowed, or
    where `least` the smallest. said: both, in words."""

    field: str
    text: str
    variant: str
    metric: str
    measured: float
    limit: float
    least: bool
    passed: bool
    said: str

    @property
    def beyond(self) -> float:
        """By how much the limit is exceeded; at most zero where it is kept."""
        return self.limit - self.measured if self.least else self.measured - self.limit


class BenchmarkReport(Config):
    """All models on a task of the lm-evaluation-harness. items: that were asked. scores: variant -> metric -> score."""

    items: int
    scores: Mapping[str, Mapping[str, float]]


class SampleReport(Config):
    """prompt: the beginning of a window. texts: variant -> what it writes after it. common: variant -> how many tokens in a
    row, from the first, are those of the original."""

    prompt: str
    texts: Mapping[str, str]
    common: Mapping[str, int]


class GenerationReport(Config):
    """Greedy samples. prompt_tokens: of each prompt, 0 in reports that are older; new_tokens: of what follows it.
    longest_common: variant -> mean over samples of `SampleReport.common`."""

    prompt_tokens: int = 0
    new_tokens: int
    longest_common: Mapping[str, float]
    samples: tuple[SampleReport, ...]
