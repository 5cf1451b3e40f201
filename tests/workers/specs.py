"""Specs of tasks on a checkpoint in a directory, as the orchestrator would make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from counterweight.workers.calibration.experts import ExpertCalibration
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.dtypes import ComputeDtype
from counterweight.workers.models.block_builder import BlockBuilder
from counterweight.workers.recipe import ModuleRecipe, Recipe
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.block import BlockSpec
from counterweight.workers.tasks.embed import Embed
from counterweight.workers.tasks.setting import Setting
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.workspace import Blob, Workspace
from tests.models import EMBEDDING, read_config, read_tensors

RECIPE: Mapping[str, Any] = {
    "weights": {"bits": 4, "group_size": 32, "quantizer": {"kind": "rtn"}},
    "compensation": {"kind": "svd", "rank": {"count": 4}},
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """A source checkpoint and a workspace."""

    source: Path
    work: Path
    compute_dtype: ComputeDtype = "float32"

    @property
    def workspace(self) -> Workspace:
        return Workspace(open_store(self.work.as_uri()))

    @property
    def builder(self) -> BlockBuilder:
        return BlockBuilder(read_config(self.source))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.source)

    @property
    def digests(self) -> dict[str, str]:
        return {name: tensor_digest(tensor) for name, tensor in self.tensors.items()}

    @property
    def setting(self) -> Setting:
        return Setting(
            source=self.source.as_uri(),
            config=read_config(self.source),
            workspace=self.work.as_uri(),
            compute_dtype=self.compute_dtype,
            device="cpu",
        )

    def put_tokens(self, ids: Tensor) -> Blob:
        """Token ids as a blob of the workspace."""
        return put_tensors(self.workspace, {"input_ids": ids.int()})

    def embed(self, ids: Tensor) -> Embed:
        """The task that makes block 0's inputs."""
        return Embed(setting=self.setting, tokens=self.put_tokens(ids), tensor=(EMBEDDING, self.digests[EMBEDDING]))

    def block(
        self,
        index: int,
        inputs: tuple[Blob, ...],
        recipe: Mapping[str, Any] = RECIPE,
        propagate: Literal["original", "compressed"] = "original",
        experts: ExpertCalibration | None = None,
    ) -> BlockSpec:
        """One block's task."""
        builder, digests = self.builder, self.digests
        whole = Recipe.model_validate(dict(recipe))
        parts: dict[str, ModuleRecipe] = {}
        for name in (name for group in builder.layout.block_linears(index) for name in group):
            part = whole.for_module(builder.layout.module_name(index, name))
            if part is not None:
                parts[name] = part
        sources = {part.source for part in builder.layout.sources(index, digests).values()}
        return BlockSpec(
            setting=self.setting,
            index=index,
            tensors={name: digests[name] for name in sorted(sources)},
            inputs=inputs,
            recipe=parts,
            propagate=propagate,
            experts=experts,
        )
