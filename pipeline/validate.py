"""Distributed validation, and the gates that a publication must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from counterweight.pipeline.artifact import Artifact, FileEntry
from counterweight.pipeline.artifact.report import Quality, TaskReport
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.graph import Graph, Node, giving
from counterweight.pipeline.manifest import Gates, Validation
from counterweight.workers.errors import GateError
from counterweight.workers.ledger import LEDGER
from counterweight.workers.metrics import METRICS, Metric
from counterweight.workers.tasks.evaluate import BASELINE, COMPENSATED, PREFILL, Evaluate, EvaluateRecord, WindowMetrics
from counterweight.workers.tasks.original import Original, OriginalRecord
from counterweight.workers.tasks.setting import shard_sequences


@dataclass(frozen=True, slots=True)
class Windows:
    """Of every window, in order. metrics: of each variant. routers: of each variant and sparse block (`EvaluateRecord`)."""

    metrics: dict[str, list[WindowMetrics]] = field(default_factory=dict)
    routers: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def add(self, record: EvaluateRecord) -> None:
        """Takes in further windows."""
        for variant, found in record.windows.items():
            self.metrics.setdefault(variant, []).extend(found)
        for variant, blocks in record.routers.items():
            for block, shares in blocks.items():
                self.routers.setdefault(variant, {}).setdefault(block, []).extend(shares)


@dataclass(frozen=True, slots=True)
class Reference:
    """Some of the windows, and what the original makes of them."""

    task: Original
    node: Node[OriginalRecord]


def add_originals(graph: Graph, whole: Original, length: int, workers: int) -> list[Reference]:
    """The nodes of what the original makes of each worker's windows, of `length` tokens. Nothing in them is a recipe's: workers
    that wait for a block run them, and another recipe on this model and text finds them done. whole: of all windows."""
    found = []
    for share in shares(whole.stop, length, workers):
        task = whole.model_copy(update={"start": share.start, "stop": share.stop})
        found.append(Reference(task, graph.add(giving(task))))
    return found


def validate(
    dispatcher: Dispatcher,
    references: Sequence[Reference],
    artifact: Artifact,
    files: Mapping[str, FileEntry],
    done: Callable[[int, int], None],
) -> tuple[Windows, list[TaskReport]]:
    """Measures the assembled files, as they lie in the store, against what the original makes of the windows.

    Every worker reads original and artifact once, for its share of the windows. A window's numbers do not depend on how many
    workers there are, and they are put together in order, so neither do the means. done(finished tasks, all tasks).
    """

    def judged(reference: Reference) -> Evaluate:
        return Evaluate(
            original=reference.task,
            found=reference.node.value,
            artifact=artifact.uri,
            ledger=files[LEDGER].sha256,
            written=True,
        )

    originals = [reference.node for reference in references]
    nodes = [
        dispatcher.graph.add(partial(judged, reference), reads=(reference.node,), after=(reference.node,))
        for reference in references
    ]

    def finished(_: Node[EvaluateRecord]) -> None:
        done(sum(node.done for node in nodes), len(nodes))

    merged = Windows()
    for record in dispatcher.run(nodes, finished):
        merged.add(record)
    reports = [(node.made().name, node.reused, node.value.timing) for node in originals]
    reports += [(node.made().name, node.reused, node.value.timing) for node in nodes]
    return merged, [TaskReport(name=name, reused=reused, timing=timing) for name, reused, timing in reports]


def shares(windows: int, length: int, workers: int) -> list[range]:
    """The windows of each worker: whole batches, because the last bits of a matrix product may depend on its number of rows (an
    expert's few tokens)."""
    batch = shard_sequences(length)
    share = -(-windows // (batch * workers)) * batch
    return [range(start, min(start + share, windows)) for start in range(0, windows, share)]


def check_gates(validation: Validation, found: Mapping[str, Quality]) -> None:
    """GateError naming every gate that the compressed model does not pass; found: variant -> its quality."""
    baseline, decoding = found[BASELINE], found[COMPENSATED]
    sets = [("gates", validation.gates, decoding)]
    if validation.prefill_gates is not None:
        sets.append(("prefill_gates", validation.prefill_gates, found.get(PREFILL, decoding)))
    failures = [
        f"spec.validation.{field}.{metric.gate}: {problem}"
        for field, gates, compensated in sets
        for metric in METRICS
        if (problem := _failure(metric, gates, baseline, compensated))
    ]
    if failures:
        raise GateError("\n".join(failures))


def _failure(metric: Metric, gates: Gates, baseline: Quality, compensated: Quality) -> str | None:
    """What a metric's gate has against a model, None when there is no bound or it is kept."""
    bound: float | None = getattr(gates, metric.gate)
    found, original = compensated.of(metric), baseline.of(metric)
    if bound is None or found is None or original is None:
        return None
    measured = f"{found:{metric.digits}}"
    if metric.relative:
        ratio = found / original
        measured = f"{ratio:.4f} ({metric.short} {measured}, original {original:{metric.digits}})"
        found = ratio
    # Written so that what is no number passes nothing.
    kept = found >= bound if metric.higher_is_better else found <= bound
    limit = "least" if metric.higher_is_better else "most"
    return None if kept else f"{measured}: expected at {limit} {bound:g}"
