"""Distributed validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from counterweight.pipeline.artifact import Artifact, FileEntry
from counterweight.pipeline.artifact.report import (
    TaskReport,
    TextReport,
    TokensReport,
    by_window,
    quality,
    tokens_report,
)
from counterweight.pipeline.dispatch import Dispatcher
from counterweight.pipeline.graph import Graph, Node, giving
from counterweight.pipeline.manifest import Validation
from counterweight.pipeline.shares import original_shares, originals_first
from counterweight.pipeline.tokens import Tokens
from counterweight.workers.ledger import LEDGER
from counterweight.workers.metrics import kl_by_position
from counterweight.workers.metrics.metric import mean
from counterweight.workers.tasks.evaluate import (
    BASELINE,
    COMPENSATED,
    Evaluate,
    EvaluateRecord,
    WindowMetrics,
    WindowProfiles,
)
from counterweight.workers.tasks.original import Original, OriginalRecord


@dataclass(frozen=True, slots=True)
class Windows:
    """Of every window, in order. metrics, profiles: of each variant. routers: of each variant and sparse block
    (`EvaluateRecord`)."""

    metrics: dict[str, list[WindowMetrics]] = field(default_factory=dict)
    profiles: dict[str, list[WindowProfiles]] = field(default_factory=dict)
    routers: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    def add(self, record: EvaluateRecord) -> None:
        """Takes in further windows."""
        for variant, found in record.windows.items():
            self.metrics.setdefault(variant, []).extend(found)
            self.profiles.setdefault(variant, []).extend(record.profiles[variant])
        for variant, blocks in record.routers.items():
            for block, shares in blocks.items():
                self.routers.setdefault(variant, {}).setdefault(block, []).extend(shares)

    def by_text(self, texts: Mapping[str, TokensReport]) -> dict[str, TextReport]:
        """The summary of each text's windows, which lie one text behind the other. texts: by name, in order."""
        found, start = {}, 0
        for name, tokens in texts.items():
            part = slice(start, start + tokens.sequences)
            start = part.stop
            found[name] = TextReport(
                tokens=tokens,
                kl_by_position={variant: _means(along[part]) for variant, along in self.profiles.items()},
                windows={variant: by_window(self.metrics[variant][part]) for variant in (BASELINE, COMPENSATED)},
                **{variant: quality(windows[part]) for variant, windows in self.metrics.items()},
            )
        return found


@dataclass(frozen=True, slots=True)
class Reference:
    """Windows that one task of the validation measures, and what the original makes of them. task: the original on these
    windows alone. node: runs it on them, and perhaps on others, from `first` on."""

    task: Original
    node: Node[OriginalRecord]
    first: int


def add_originals(graph: Graph, whole: Original, length: int, workers: int) -> list[Reference]:
    """The nodes of what the original makes of each worker's windows, of `length` tokens. Nothing in them is a recipe's: another
    recipe on this model and text finds them done. whole: of all windows.

    On a GPU each reads the model for longer than it computes, so they are no more than they have tokens for.
    """

    divided = original_shares(whole.stop, length, workers, gpu=whole.setting.device == "cuda")

    def of(windows: range) -> Original:
        return whole.model_copy(update={"start": windows.start, "stop": windows.stop, "shared": len(divided) > 1})

    found: list[Reference] = []
    for together in divided:
        first = together[0].start
        node = graph.add(giving(of(range(first, together[-1].stop))), soon=originals_first(divided))
        found += [Reference(of(share), node, first) for share in together]
    return found


def validate(
    dispatcher: Dispatcher,
    references: Sequence[Reference],
    artifact: Artifact,
    files: Mapping[str, FileEntry],
    done: Callable[[int, int], None],
) -> tuple[Windows, list[TaskReport]]:
    """Measures the assembled files, as they lie in the store, against what the original makes of the windows.

    Every worker reads the artifact once, for its share of the windows. A window's numbers do not depend on how many
    workers there are, and they are put together in order, so neither do the means. done(finished tasks, all tasks).
    """

    def judged(reference: Reference) -> Evaluate:
        return Evaluate(
            original=reference.task,
            found=reference.node.value,
            first=reference.first,
            artifact=artifact.uri,
            ledger=files[LEDGER].sha256,
            shared=len(references) > 1,
            written=True,
        )

    originals = list(dict.fromkeys(reference.node for reference in references))
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


def described(validation: Validation | None, tokens: Tokens) -> dict[str, TokensReport]:
    """Every text of a validation, in order, as a report has it."""
    if validation is None:
        return {}
    specials = validation.special_tokens or tokens.usual
    return {
        name: tokens_report(source, tokens.validation[name], special_tokens=specials)
        for name, (source, _) in validation.sources.items()
    }


def _means(windows: Sequence[WindowProfiles]) -> tuple[float, ...]:
    """Mean over windows of the divergence by position, range by range."""
    columns = zip(*(window[kl_by_position.PROFILE.name] for window in windows), strict=True)
    return tuple(mean(column) for column in columns)
