"""The residual stores of an artifact: per module, rows by input channel, which no other tool knows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from counterweight.kernels.residual import Correction, ResidualStore
from counterweight.workers.errors import CheckpointError
from counterweight.workers.formats import ModuleFormat

RESIDUAL = ("residual_packed", "residual_scale", "residual_thresholds")
STATIC = "residual_importance"


def residual_names(module: str, form: ModuleFormat) -> tuple[str, ...]:
    """Names of the tensors of a linear's residual store; none when it has none."""
    if form.residual is None:
        return ()
    parts = (*RESIDUAL, STATIC) if form.residual.selection == "static" else RESIDUAL
    return tuple(f"{module}.{part}" for part in parts)


def residual_tensors(module: str, correction: Correction) -> dict[str, Tensor]:
    """A residual store under its names: rows by input channel, packed; scales by output channel; thresholds."""
    store = correction.store
    tensors = dict(zip(RESIDUAL, (store.packed, store.scale, store.thresholds), strict=True))
    if correction.selection == "static" and correction.importance is not None:
        tensors[STATIC] = correction.importance
    return {f"{module}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def read_residual(
    tensors: Mapping[str, Tensor], module: str, form: ModuleFormat, shape: tuple[int, int]
) -> Correction | None:
    """The residual of `module`, a linear of `shape` [out, in]; CheckpointError when its tensors are not of that shape."""
    if form.residual is None:
        return None
    local = {name.rsplit(".", 1)[1]: tensor for name, tensor in tensors.items()}
    packed, scale, thresholds = (local[name] for name in RESIDUAL)
    rows, columns = shape
    words = -(-rows * form.residual.bits // 32)
    found = (tuple(packed.shape), tuple(scale.shape), tuple(thresholds.shape))
    if found != ((columns, words), (rows,), (columns,)) or packed.dtype != torch.int32:
        raise CheckpointError(f"residual: {module}: shapes {found}: expected those of a layer [{rows}, {columns}]")
    store = ResidualStore(packed=packed, scale=scale, thresholds=thresholds, out_features=rows, bits=form.residual.bits)
    return Correction(
        store=store,
        selection=form.residual.selection,
        channels_per_chunk=form.residual.channels_per_chunk,
        importance=local.get(STATIC),
    )
