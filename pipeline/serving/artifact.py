"""What an inference engine needs of an artifact beside the tensors that its own loader streams: how each linear is stored, its
branch and its residual store, digests. Every tensor is compared with its digest, whoever read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from counterweight.kernels.weights import format_of
from counterweight.pipeline.artifact.reader import open_artifact, parsed
from counterweight.workers.block import CompressedLinear
from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.errors import CheckpointError
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.interchange.compressed_tensors import read_weight
from counterweight.workers.interchange.peft import factor_names, read_branch
from counterweight.workers.interchange.residual_store import read_residual, residual_names
from counterweight.workers.ledger import ADAPTER, LEDGER, RESIDUAL_STORE, Ledger
from counterweight.workers.transforms.online import hadamard

KEPT = ("weight",)
"""Tensors of a linear that is not quantized."""


@dataclass(frozen=True)
class ServedArtifact:
    """An artifact in a local folder. It holds no open file, so that an engine may pickle it into its processes.

    formats: quantized linear -> how it is stored. digests: stored tensor -> sha256.
    """

    folder: str
    formats: Mapping[str, ModuleFormat]
    digests: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path) -> ServedArtifact:
        """Reads the ledger. RequestError when there is no artifact, IntegrityError when a file that says how tensors are to be
        read is not the one that artifact.json names, CheckpointError for a ledger that is none."""
        store, _ = open_artifact(folder.resolve().as_uri())
        ledger = parsed(Ledger, store, LEDGER, "a ledger", store.read(LEDGER))
        return cls(folder=str(folder), formats=ledger.formats, digests=ledger.tensors)

    def expected(self, module: str) -> tuple[str, ...]:
        """Names, after the module's and a dot, of the tensors that the checkpoint holds of a linear."""
        form = self.formats.get(module)
        return KEPT if form is None else format_of(form.kind).names(form.weight)

    def check(self, name: str, tensor: Tensor) -> None:
        """CheckpointError unless the tensor is the one that the ledger has under this name."""
        if name not in self.digests:
            raise CheckpointError(f"{LEDGER}: no digest of tensor {name}")
        if tensor_digest(tensor) != self.digests[name]:
            raise CheckpointError(f"{name}: its content is not what {LEDGER} says")

    def linear(self, module: str, tensors: Mapping[str, Tensor]) -> CompressedLinear:
        """The quantized linear `module` from its tensors by name after the module's, with its branch and its residual store.
        CheckpointError where something is missing, or is not what its format says."""
        form = self.formats[module]
        weight = read_weight({f"{module}.{name}": tensor for name, tensor in tensors.items()}, module, form)
        branch, residual = None, None
        if form.rank:
            factors = self._beside(ADAPTER, factor_names(module, form.factor_bits))
            branch = read_branch(factors, module, form, weight.shape)
        if form.residual is not None:
            stored = self._beside(RESIDUAL_STORE, residual_names(module, form))
            residual = read_residual(stored, module, form, weight.shape)
        return CompressedLinear(
            weight=weight, low_rank=branch, activations=form.activations, transform=hadamard(form), residual=residual
        )

    def _beside(self, file: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of a file that the engine's loader does not read."""
        path = Path(self.folder) / file
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file: the artifact's ledger speaks of it")
        with safe_open(path, "pt") as opened:
            there = set(opened.keys())
            if missing := sorted(set(names) - there):
                raise CheckpointError(f"{path}: missing {missing[0]}")
            tensors = {name: opened.get_tensor(name) for name in names}
        for name, tensor in tensors.items():
            self.check(name, tensor)
        return tensors
