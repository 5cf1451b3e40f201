"""The tensors of some linears while an engine's loader streams them, in whatever order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from counterweight.pipeline.serving.artifact import KEPT, ServedArtifact
from counterweight.workers.block import CompressedLinear
from counterweight.workers.errors import CheckpointError


class Intake:
    """Takes tensors by module and name, each compared with its digest, and gives whole linears."""

    def __init__(self, artifact: ServedArtifact, modules: Sequence[str]) -> None:
        self._artifact = artifact
        self._tensors: dict[str, dict[str, Tensor]] = {module: {} for module in modules}

    @property
    def names(self) -> list[str]:
        """Names, after a module's and a dot, that occur."""
        return sorted({name for module in self._tensors for name in self._artifact.expected(module)})

    def put(self, module: str, name: str, tensor: Tensor) -> None:
        """CheckpointError for a tensor that this linear does not have, or that is not the one of the ledger."""
        if name not in self._artifact.expected(module):
            raise CheckpointError(f"{module}: unexpected {name}: expected {', '.join(self._artifact.expected(module))}")
        self._artifact.check(f"{module}.{name}", tensor)
        self._tensors[module][name] = tensor.clone()  # of memory of its own: the loader's is a file's

    def expect_all(self) -> None:
        """CheckpointError, naming one, when a tensor never came: the engine's own loader does not look."""
        for module, tensors in self._tensors.items():
            for name in self._artifact.expected(module):
                if name not in tensors:
                    raise CheckpointError(f"{module}.{name}: missing from the checkpoint")

    def take(self, module: str) -> CompressedLinear | Tensor:
        """The linear, or the weight [out, in] of one that is not quantized; its tensors are forgotten here."""
        tensors = self._tensors.pop(module)
        if self._artifact.expected(module) == KEPT:
            return tensors[KEPT[0]]
        return self._artifact.linear(module, tensors)
