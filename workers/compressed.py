"""Our own loader of an artifact's weights: strict, verified, one block at a time.

Files below an artifact's root that this module knows:

    config.json                                model configuration, quantization in compressed-tensors' form
    ledger.json                                what became of every source tensor, how every stored one is to be read
    model-*.safetensors (+ index)              packed weights and everything that was kept
    compensation/adapter_model.safetensors     low-rank branches, when there are any
    residual/residual.safetensors              residual stores, when there are any
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from pydantic import ValidationError
from torch import Tensor

from counterweight.workers.block import CompressedLinear
from counterweight.workers.checkpoint.reader import Checkpoint
from counterweight.workers.checkpoint.strict_json import check_object
from counterweight.workers.config import first_problem
from counterweight.workers.errors import CheckpointError, ObjectNotFoundError
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.interchange.compressed_tensors import read_weight, source_config, weight_names
from counterweight.workers.interchange.peft import factor_names, read_branch
from counterweight.workers.interchange.residual_store import RESIDUAL, read_residual, residual_names
from counterweight.workers.ledger import ADAPTER, LEDGER, RESIDUAL_STORE, Ledger
from counterweight.workers.models.block_builder import Block, BlockBuilder
from counterweight.workers.models.config_values import check_layers
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.quantization.inputs import all_finite
from counterweight.workers.storage import ObjectStore, sha256_hex
from counterweight.workers.transforms.online import hadamard

MAX_LEDGER_BYTES = 256 << 20
"""Of a ledger.json; a tensor takes some 300 bytes, and a model has at most 200,000."""

MAX_LEDGER_VALUES = 20_000_000


class CompressedModel:
    """An artifact, opened: headers read, names and digests agreed on, no tensor loaded.

    Raises CheckpointError when files and ledger disagree, StorageError as the store does.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: Checkpoint | None, residual: Checkpoint | None, ledger: Ledger
    ) -> None:
        config = source_config(checkpoint.config)
        check_layers(config, checkpoint.names)
        self.builder = BlockBuilder(config, frozenset(checkpoint.names))
        self.ledger = ledger
        self._checkpoint, self._residual = checkpoint, residual
        parts = [part for part in (adapter, residual) if part is not None]
        self._file_of = {name: part for part in parts for name in part.names}
        forms, layout = ledger.formats, self.builder.layout
        factors = {
            name
            for module, form in forms.items()
            if form.rank
            for name in factor_names(layout.stock_name(module), form.factor_bits)
        }
        residuals = {name for module, form in forms.items() for name in residual_names(module, form)}
        stored: set[str] = set()
        problems: list[str] = []
        weights = _weights(self.builder.layout, forms)
        files = (("weights", checkpoint, weights), ("adapter", adapter, factors), ("residual", residual, residuals))
        for file, part, expected in files:
            found = set() if part is None else set(part.names)
            stored |= found
            # What a multimodal model has beside its text model is carried over; the ledger has its digests.
            found = {name for name in found if not layout.is_beside(name)}
            problems += [f"{file}: missing {name}" for name in sorted(expected - found)]
            problems += [f"{file}: unexpected {name}" for name in sorted(found - expected)]
        problems += [f"{LEDGER}: no digest of {name}" for name in sorted(stored - ledger.tensors.keys())]
        problems += [f"missing tensor {name}" for name in sorted(ledger.tensors.keys() - stored)]
        for name, expected_shape in self._ends.items():
            if name in checkpoint.names and checkpoint.entry(name).shape != expected_shape:
                found_shape = list(checkpoint.entry(name).shape)
                problems.append(f"{name}: shape {found_shape}: expected {list(expected_shape)} (config.json)")
        if problems:
            raise CheckpointError("; ".join(problems[:5]) + ("" if len(problems) <= 5 else f"; {len(problems)} in all"))

    @classmethod
    def open(cls, store: ObjectStore, *, ledger_sha256: str | None = None) -> CompressedModel:
        """Reads config.json, ledger.json and headers. IntegrityError when the ledger is not the one of this sha256."""
        checkpoint = Checkpoint.open(store, quantized=True)
        try:
            data = store.read_bounded(LEDGER, MAX_LEDGER_BYTES)
            if ledger_sha256 is not None and sha256_hex(data) != ledger_sha256:
                data = store.read(LEDGER, sha256=ledger_sha256)
            check_object(data, file=store.uri_of(LEDGER), max_values=MAX_LEDGER_VALUES)
            ledger = Ledger.model_validate_json(data)
        except ObjectNotFoundError as error:
            raise CheckpointError(f"{store.uri}: no {LEDGER}: expected an artifact of Counterweight") from error
        except ValidationError as error:
            raise CheckpointError(f"{store.uri_of(LEDGER)}: {first_problem(error)}") from error
        adapter = Checkpoint.of_file(store, ADAPTER) if any(form.rank for form in ledger.formats.values()) else None
        with_store = any(form.residual is not None for form in ledger.formats.values())
        residual = Checkpoint.of_file(store, RESIDUAL_STORE) if with_store else None
        return cls(checkpoint, adapter, residual, ledger)

    def block(self, index: int, device: torch.device, dtype: torch.dtype) -> tuple[Block, dict[str, CompressedLinear]]:
        """Block `index` with its kept parameters filled in, and its compressed linears, not yet installed.

        Linears that are quantized hold no weight until `install` puts their compressed selves in place.
        """
        return read_block(self.builder, index, self.ledger.formats, self._read_many, device, dtype)

    @contextmanager
    def shared(self, content: str) -> Iterator[None]:
        """See `Checkpoint.shared`, of all its files."""
        with ExitStack() as files:
            for part in {self._checkpoint, *self._file_of.values()}:
                files.enter_context(part.shared(content))
            yield

    @property
    def _ends(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what lies around the blocks."""
        matrix = (self.builder.vocabulary, self.builder.hidden_size)
        names = self.builder.names
        return {names.embedding: matrix, names.norm: matrix[1:], **({} if self.builder.tied else {names.head: matrix})}

    @property
    def residual_sizes(self) -> list[int]:
        """Bytes of each layer's residual rows, for whoever keeps them in host memory; empty without a residual store."""
        entries = [] if self._residual is None else [self._residual.entry(name) for name in self._residual.names]
        return [entry.length for entry in entries if entry.name.endswith(f".{RESIDUAL[0]}")]

    def embedding(self) -> Tensor:
        """The embedding [vocabulary, hidden]."""
        return self._read(self.builder.names.embedding)

    def head(self) -> dict[str, Tensor]:
        """Final norm and lm_head (of a tied model: the embedding)."""
        names = self.builder.names
        head = names.embedding if self.builder.tied else names.head
        return {names.norm: self._read(names.norm), names.head: self._read(head)}

    def _read(self, name: str) -> Tensor:
        return self._read_many([name])[name]

    def _digest(self, name: str) -> str:
        if name not in self.ledger.tensors:
            raise CheckpointError(f"{LEDGER}: no digest of tensor {name}")
        return self.ledger.tensors[name]

    def _read_many(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of one of the files, verified."""
        part = self._file_of.get(names[0], self._checkpoint)
        tensors = part.read_many(names, sha256={name: self._digest(name) for name in names})
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.numel() and not all_finite(tensor):
                raise CheckpointError(f"{name}: holds NaN or infinity: expected finite values")
        return tensors


def _weights(layout: ModelLayout, formats: Mapping[str, ModuleFormat]) -> set[str]:
    """Names of the tensors that the checkpoint of a model with these compressed linears consists of."""
    own = layout.names
    names = {own.embedding, own.norm} | (set() if layout.tied else {own.head})
    for index in range(layout.blocks):
        for parameter in layout.block_parameters(index):
            stored = layout.disk_name(index, parameter)
            form = formats.get(stored.removesuffix(".weight")) if parameter.endswith(".weight") else None
            names |= {stored} if form is None else set(weight_names(stored.removesuffix(".weight"), form))
    return names


def read_block(
    builder: BlockBuilder,
    index: int,
    formats: Mapping[str, ModuleFormat],
    read: Callable[[Sequence[str]], Mapping[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Block, dict[str, CompressedLinear]]:
    """A compressed block, see `CompressedModel.block`. formats: full module name, as stored -> format. read: stored tensors by
    name, at each call of one of checkpoint, adapter and residual store. CheckpointError when shapes are not the model's."""
    linears: dict[str, CompressedLinear] = {}
    parameters: dict[str, Tensor] = {}
    for parameter, shape in builder.layout.block_parameters(index).items():
        stored = builder.layout.disk_name(index, parameter)
        module = stored.removesuffix(".weight")
        form = formats.get(module)
        if form is not None and parameter.endswith(".weight"):
            _check_width(module, form, shape)
            try:
                linear = read_linear(module, form, read, device, branch_of=builder.layout.stock_name(module))
            except ValueError as error:  # what kernels say of sizes and bits that do not go together
                raise CheckpointError(f"{module}: {error}") from error
            _expect_shape(module, linear.weight.shape, shape)
            linears[parameter.removesuffix(".weight")] = linear
        else:
            parameters[parameter] = read([stored])[stored]
            _expect_shape(stored, tuple(parameters[parameter].shape), shape)
    return builder.block(index, parameters, device, dtype, absent=linears), linears


def read_linear(
    module: str,
    form: ModuleFormat,
    read: Callable[[Sequence[str]], Mapping[str, Tensor]],
    device: torch.device,
    *,
    branch_of: str,
) -> CompressedLinear:
    """The linear `module` from its stored tensors, see `read_block`. branch_of: what the adapter calls it. CheckpointError."""
    weight = read_weight(read(weight_names(module, form)), module, form)
    branch = None
    if form.rank:
        branch = read_branch(read(factor_names(branch_of, form.factor_bits)), branch_of, form, weight.shape)
    residual = None
    if form.residual is not None:
        residual = read_residual(read(residual_names(module, form)), module, form, weight.shape)
    linear = CompressedLinear(
        weight=weight,
        low_rank=branch,
        activations=form.activations,
        transform=hadamard(form),
        residual=residual,
    )
    return linear.to(device)


def _check_width(module: str, form: ModuleFormat, shape: tuple[int, ...]) -> None:
    """CheckpointError where what is done to the input of a linear of `shape` [out, in] does not fit its width."""
    columns, tiles, transform = shape[-1], form.activation_group_size, hadamard(form)
    if tiles is not None and columns % tiles:
        raise CheckpointError(f"{module}: activation_group_size: {tiles}: expected a divisor of {columns}")
    if transform is not None and transform.width != columns:
        raise CheckpointError(f"{module}: online: a transform of {transform.width} channels: expected {columns}")


def _expect_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if found != shape:
        raise CheckpointError(f"{name}: shape {list(found)}: expected {list(shape)} (config.json)")
