"""Distributed validation, and the gates that a publication must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from counterweight.pipeline.artifact import Artifact, FileEntry
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.manifest import Gates
from counterweight.pipeline.report import Quality, TaskReport
from counterweight.workers.errors import GateError
from counterweight.workers.ledger import LEDGER
from counterweight.workers.tasks.evaluate import Evaluate, WindowMetrics
from counterweight.workers.tasks.setting import Setting, shard_sequences
from counterweight.workers.workspace import Blob

Windows = dict[str, list[WindowMetrics]]


def validate(
    dispatcher: Dispatcher,
    setting: Setting,
    digests: Mapping[str, str],
    artifact: Artifact,
    files: Mapping[str, FileEntry],
    tokens: Blob,
    windows: int,
    length: int,
    workers: int,
    done: Callable[[int, int], None],
) -> tuple[Windows, list[TaskReport]]:
    """Measures the assembled files, as they lie in the store, against the original on `windows` windows of `length` tokens.

    Every worker reads the model once, for its share of the windows: whole batches, because the last bits of a matrix
    product may depend on its number of rows (an expert's few tokens). So a window's numbers do not depend on how many
    workers there are, and they are put together in order, so neither do the means. done(finished tasks, all tasks).
    """
    batch = shard_sequences(length)
    share = -(-windows // (batch * workers)) * batch
    tasks = [
        Evaluate(
            setting=setting,
            tensors=digests,
            artifact=artifact.uri,
            ledger=files[LEDGER].sha256,
            tokens=tokens,
            start=start,
            stop=min(start + share, windows),
        )
        for start in range(0, windows, share)
    ]
    records = dispatcher.run_all(tasks, lambda count: done(count, len(tasks)))
    merged: Windows = {}
    for record in records:
        for variant, found in record.windows.items():
            merged.setdefault(variant, []).extend(found)
    reports = [
        TaskReport(name=task.name, reused=False, timing=record.timing)
        for task, record in zip(tasks, records, strict=True)
    ]
    return merged, reports


def check_gates(gates: Gates, baseline: Quality, compensated: Quality) -> None:
    """GateError naming every gate that the model as it is served does not pass."""
    failures: list[str] = []
    ratio = compensated.perplexity / baseline.perplexity
    if gates.perplexity_ratio is not None and not ratio <= gates.perplexity_ratio:
        failures.append(
            f"spec.validation.gates.perplexity_ratio: {ratio:.4f} (perplexity {compensated.perplexity:.4f}, original "
            f"{baseline.perplexity:.4f}): expected at most {gates.perplexity_ratio:g}"
        )
    if gates.kl is not None and not compensated.kl <= gates.kl:
        failures.append(f"spec.validation.gates.kl: {compensated.kl:.5f}: expected at most {gates.kl:g}")
    if failures:
        raise GateError("\n".join(failures))
