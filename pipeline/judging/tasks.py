"""Tasks of the lm-evaluation-harness, asked of every model when it is assembled, and bounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from counterweight.pipeline.artifact.verdict import BenchmarkReport, GateReport
from counterweight.pipeline.judging.paired import p_value
from counterweight.pipeline.manifest.validation import HarnessTask
from counterweight.workers.errors import RequestError
from counterweight.workers.harness import Documents
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED
from counterweight.workers.tasks.harness import TaskScore

TaskScores = Mapping[str, Mapping[str, TaskScore]]
"""Variant -> task -> score."""


def as_bytes(documents: Documents) -> torch.Tensor:
    """JSON, [bytes] uint8: the form in which workers find it in the store."""
    return torch.frombuffer(bytearray(documents.model_dump_json().encode()), dtype=torch.uint8)


def benchmarks(found: TaskScores) -> dict[str, BenchmarkReport]:
    """Task -> what each model scores; empty without tasks."""
    return {
        name: BenchmarkReport(
            items=max((len(values) for values in score.items.values()), default=0),
            scores={variant: tasks[name].scores for variant, tasks in found.items()},
        )
        for name, score in found.get(BASELINE, {}).items()
    }


def judge_tasks(tasks: Mapping[str, HarnessTask], found: TaskScores) -> Iterator[GateReport]:
    """Every bound of the tasks. RequestError for a metric that a task does not have."""
    for name, task in tasks.items():
        original, compressed = found[BASELINE][name], found[COMPENSATED][name]
        for metric, limit in task.max_drop.items():
            field = f"spec.validation.tasks.{name}.max_drop.{metric}"
            if metric not in original.scores:
                raise RequestError(f"{field}: expected one of {', '.join(original.scores)}")
            if task.significance is not None and not original.items.get(metric):
                raise RequestError(
                    f"spec.validation.tasks.{name}.significance: {task.significance:g}: expected null: {metric} is of all "
                    "items together, and a paired test needs a number for each"
                )
            before, after = original.scores[metric], compressed.scores[metric]
            sign = 1.0 if original.higher_is_better[metric] else -1.0
            drop = sign * (before - after)
            chance = p_value(
                _signed(original.items.get(metric, ()), sign), _signed(compressed.items.get(metric, ()), sign)
            )
            significant = task.significance is None or chance < task.significance
            tested = "" if task.significance is None else f", at a significance of {task.significance:g}"
            yield GateReport(
                field=field,
                text=name,
                variant=COMPENSATED,
                metric=metric,
                measured=drop,
                limit=limit,
                least=False,
                passed=drop <= limit or not significant,
                said=(
                    f"{drop:.4f} worse ({metric} {after:.4f}, original {before:.4f}, p {chance:.3g}): expected at most "
                    f"{limit:g}{tested}"
                ),
            )


def _signed(items: Sequence[float], sign: float) -> list[float]:
    """So that more is better; what is right or wrong stays that."""
    return list(items) if sign > 0 else [1.0 - value if value in (0.0, 1.0) else -value for value in items]
