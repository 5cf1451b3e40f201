"""What one model scores on tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.config import Config
from counterweight.workers.keys import digest
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.records import Timing
from counterweight.workers.tasks.task import DurableTask
from counterweight.workers.tasks.whole import WholeModel
from counterweight.workers.workspace import Blob, Record, Workspace

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


class TaskScore(Config):
    """A model on a task. items: metric -> a number for each item, in order. scores: metric -> what the harness makes of them.
    higher_is_better: of each metric."""

    items: Mapping[str, tuple[float, ...]]
    scores: Mapping[str, float]
    higher_is_better: Mapping[str, bool]


class HarnessRecord(Record):
    """Task -> score."""

    tasks: Mapping[str, TaskScore]
    timing: Timing


class Harness(WholeModel, DurableTask[HarnessRecord]):
    """All tasks of a validation, asked of one model. Residual stores correct every token, as when tokens come one at a time."""

    kind: ClassVar[str] = "harness"
    record: ClassVar[type[HarnessRecord]] = HarnessRecord

    documents: Blob
    """A safetensors blob with `documents`, `harness.Documents` as bytes of JSON."""

    def key(self) -> str:
        return digest([self.kind, *self.determines(), self.documents.sha256, metadata.version("lm-eval")])

    @property
    def name(self) -> str:
        return f"tasks under {self.variant}"

    @property
    def patience(self) -> float:
        parameters = self.setting.parameters
        return patience(bytes=4 * parameters, flops=2 * parameters * self.documents.size, device=self.setting.device)

    def workspace(self) -> Workspace:
        return self.setting.open_workspace()

    def compute(self, context: TaskContext, workspace: Workspace) -> HarnessRecord:
        from counterweight.workers.clock import Clock
        from counterweight.workers.harness import Documents, ask
        from counterweight.workers.memory import release
        from counterweight.workers.tensor_blobs import get_tensors

        clock = Clock(context.device)
        data = bytes(get_tensors(workspace, self.documents)["documents"].numpy())
        documents = Documents.model_validate_json(data)
        model = self.model(context, decode_only=False)
        clock.lap("load")
        found = ask(model, documents)
        clock.lap("forward")
        del model
        release(context.device)
        return HarnessRecord(tasks=found, timing=clock.timing())
