"""What every way to store a linear layer's weight can do: the protocol that solvers, layers, artifacts and reports ask.

A format is one file of this folder with one class derived from `StoredWeight`, a frozen dataclass of tensors and numbers. It
says what it takes in memory and in a checkpoint, how it is read back from tensors that nobody has checked, and how it is
multiplied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from counterweight.kernels.forms import WeightForm

_HELD = "_held"
"""Attribute of a weight's dense factor; no field, so that another weight made of this one has none."""

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes in which a checkpoint stores scales."""


@dataclass(frozen=True)
class StoredWeight(ABC):
    """A linear layer's weight [out, in] as it is stored.

    refusal: why compressed-tensors, and with it stock transformers and vLLM, has no words for this format; None when it has.
    """

    kind: ClassVar[str]
    refusal: ClassVar[str | None]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def form(self) -> WeightForm:
        """What is to be known beside the tensors to read it back."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Storage of the codes, in bits."""

    @property
    @abstractmethod
    def scale_bits(self) -> int:
        """Storage of everything else that the weight is made of (scales, zero points), in bits."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], computed in float32 and cast to `dtype`."""

    @abstractmethod
    def rows(self, rows: slice) -> Self:
        """The weight of these output channels alone, in memory of its own."""

    @abstractmethod
    def columns(self, columns: slice) -> Self:
        """The weight of these input channels alone, in memory of its own; ValueError where they begin or end inside a group of
        columns that share a scale."""

    @abstractmethod
    def with_gains(self, gains: Tensor) -> Self:
        """The same codes with each output channel's scales multiplied by its gain [out], rounded to the scales' dtype."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds, under their names after the module's and a dot."""

    @classmethod
    @abstractmethod
    def names(cls, form: WeightForm) -> tuple[str, ...]:
        """Names of the `tensors` of a weight of this form."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], form: WeightForm) -> Self:
        """Inverse of `tensors`, for tensors and a form that nobody has checked yet.

        ValueError naming the first whose presence, dtype, shape or content contradicts the others or the form. Sizes are
        compared before anything is allocated from them.
        """

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] of any float dtype times the weight's transpose, plus bias [out]: [..., out] of the same dtype."""
        return functional.linear(x, self._factor(x.dtype), bias)

    def dense_factor(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in] that `linear` multiplies by."""
        return self.dequantize(dtype)

    def hold(self, dtype: torch.dtype) -> None:
        """Keeps the dense factor for every `linear` on activations of this dtype, where many batches will follow each other."""
        self.__dict__[_HELD] = self.dense_factor(dtype)

    def _factor(self, dtype: torch.dtype) -> Tensor:
        held: Tensor | None = self.__dict__.get(_HELD)
        return held if held is not None and held.dtype == dtype else self.dense_factor(dtype)

    # -- in memory ----------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors in memory, by the names of their fields."""
        assert is_dataclass(self)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def with_parts(self, parts: Mapping[str, Tensor]) -> Self:
        """The same weight made of other tensors, such as copies on another device."""
        return replace(self, **parts)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.parts.values())).device

    def to(self, device: torch.device) -> Self:
        """The same weight on another device."""
        return self.with_parts({name: tensor.to(device) for name, tensor in self.parts.items()})


def expect_names(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """ValueError unless the tensors are those of these names."""
    if tensors.keys() != set(names):
        missing, unknown = sorted(set(names) - tensors.keys()), sorted(tensors.keys() - set(names))
        raise ValueError(f"tensors of a quantized layer: missing {missing}, not expected {unknown}")


def expect_tensor(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has one of these dtypes and this shape."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: {describe(tensor)}: expected {wanted} {list(shape)}")


def expect_finite(tensor: Tensor, name: str) -> None:
    """ValueError when the tensor holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: holds NaN or infinity: expected finite values")


def read_shape(tensor: Tensor) -> tuple[int, int]:
    """(out, in) from `weight_shape`, int64 [2]; ValueError unless it holds two positive sizes."""
    expect_tensor(tensor, "weight_shape", (torch.int64,), (2,))
    rows, columns = (int(size) for size in tensor)
    if rows <= 0 or columns <= 0:
        raise ValueError(f"weight_shape: [{rows}, {columns}]: expected two positive sizes")
    return rows, columns


def describe(tensor: Tensor) -> str:
    """dtype and shape, for people."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
