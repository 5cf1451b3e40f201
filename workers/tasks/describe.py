"""What a model is: names and shapes, from its config.json and the names outside its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.tasks.patience import patience
from counterweight.workers.tasks.task import Task

if TYPE_CHECKING:
    from counterweight.workers.context import TaskContext


@dataclass(frozen=True)
class Describe(Task[ModelLayout]):
    """Names and shapes of the model with this config.json. stored: as for `BlockBuilder`. CheckpointError,
    UnsupportedModelError."""

    kind: ClassVar[str] = "describe"

    config: Mapping[str, object]
    stored: frozenset[str]

    @property
    def name(self) -> str:
        return "architecture"

    @property
    def patience(self) -> float:
        return patience()

    def run(self, context: TaskContext) -> ModelLayout:
        from counterweight.workers.models.block_builder import BlockBuilder

        return BlockBuilder(self.config, self.stored).layout
