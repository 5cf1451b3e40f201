"""The life of a distillation: a stored model is read, trained part by part, and stored again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.clock import Clock
from counterweight.workers.compressed import read_block
from counterweight.workers.context import TaskContext
from counterweight.workers.distillation.replicas import Part, averaged
from counterweight.workers.distillation.trainable import TrainableLinear, make_trainable
from counterweight.workers.distillation.training import State, Student, Text, Training, running_of
from counterweight.workers.interchange.compressed_tensors import weight_tensors
from counterweight.workers.interchange.peft import factor_tensors
from counterweight.workers.memory import release
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.models.source import head_of
from counterweight.workers.tasks.distill import Distill, DistillRecord, TrainedBlock
from counterweight.workers.tasks.epoch import Epoch, EpochRecord
from counterweight.workers.tasks.replica import Replica, ReplicaRecord
from counterweight.workers.tasks.training import StoredBlock, TrainingSpec
from counterweight.workers.tensor_blobs import get_tensors, put_tensors
from counterweight.workers.workspace import Blob, Workspace


def train(context: TaskContext, task: Replica, workspace: Workspace) -> ReplicaRecord:
    """A replica's part of a round: 1. read the model, the texts and where training stands, 2. train, 3. store."""
    clock = Clock(context.device)
    training = _training(context, task.training, workspace)
    running = _running(task.states, workspace, context.device) if task.states else training.begin()
    clock.lap("load")
    part = Part(epoch=task.epoch, round=task.round, replica=task.replica)
    running, loss = training.train(running, part)
    clock.lap("solve")
    state = _put(workspace, running)
    clock.lap("write")
    return ReplicaRecord(state=state, loss=loss, timing=clock.timing())


def close(context: TaskContext, task: Epoch, workspace: Workspace) -> EpochRecord:
    """The end of an epoch: 1. read the model and all replicas, 2. measure their mean, 3. store what goes on from there."""
    clock = Clock(context.device)
    training = _training(context, task.training, workspace)
    before = training.untrained() if task.before is None else _state(task.before, workspace, context.device)
    running = _running(task.states, workspace, context.device)
    clock.lap("load")
    state = training.close(before, running, task.loss)
    clock.lap("solve")
    blob = _put(workspace, state.tensors)
    clock.lap("write")
    return EpochRecord(
        state=blob, best=state.best, divergences=state.divergences, losses=state.losses, timing=clock.timing()
    )


def store(context: TaskContext, task: Distill, workspace: Workspace) -> DistillRecord:
    """The blocks as the epoch that is kept left them; without one there is nothing to store."""
    clock = Clock(context.device)
    last, trained = task.last, dict[int, TrainedBlock]()
    if last.best:
        training = _training(context, task.training, workspace)
        training.settle(_state(last, workspace, context.device))
        clock.lap("load")
        layout = context.source(task.training.setting)[1].layout
        trained = {block.index: _store(block, training.student, layout, workspace) for block in task.training.blocks}
    clock.lap("write")
    return DistillRecord(
        kept=last.best,
        divergences=last.divergences,
        losses=last.losses,
        blocks=trained,
        states=(last.state,),
        timing=clock.timing(),
    )


def _training(context: TaskContext, spec: TrainingSpec, workspace: Workspace) -> Training:
    """The model and its texts: those that the worker holds, or read. What the task before has left is given back first."""
    release(context.device)

    def read() -> Training:
        text, *held_out = read_texts(context, spec, workspace)
        return Training(read_student(context, spec, workspace), text, held_out, spec.options)

    return context.training.get(spec.key(), read)


def _running(states: Sequence[Blob], workspace: Workspace, device: torch.device) -> dict[str, Tensor]:
    """The mean of what replicas have left, or what an epoch has; one of them is read at a time."""
    return averaged(running_of(_get(blob, workspace, device)) for blob in states)


def _state(record: EpochRecord, workspace: Workspace, device: torch.device) -> State:
    """Behind an epoch, without what the next one has gone on from."""
    tensors = _get(record.state, workspace, device)
    return State(
        epoch=record.epoch,
        tensors={name: tensor for name, tensor in tensors.items() if name not in running_of(tensors)},
        best=record.best,
        divergences=record.divergences,
        losses=record.losses,
    )


def _get(blob: Blob, workspace: Workspace, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in get_tensors(workspace, blob).items()}


def _put(workspace: Workspace, tensors: Mapping[str, Tensor]) -> Blob:
    return put_tensors(workspace, {name: tensor.cpu() for name, tensor in tensors.items()})


def read_student(context: TaskContext, spec: TrainingSpec, workspace: Workspace) -> Student:
    """The compressed model, ready to be trained in float32."""
    checkpoint, builder = context.source(spec.setting)
    first, last = (get_tensors(workspace, blob) for blob in spec.outside)
    blocks: list[Block] = []
    linears: dict[str, TrainableLinear] = {}
    norms: dict[str, nn.Parameter] = {}
    dtypes: dict[str, torch.dtype] = {}
    for stored in spec.blocks:
        tensors = _tensors(stored, workspace)
        read = partial(_chosen, tensors)
        block, found = read_block(builder, stored.index, stored.formats, read, context.device, torch.float32)
        own, own_norms = make_trainable(block, found, torch.float32)
        for name, linear in own.items():
            linears[builder.layout.disk_name(stored.index, f"{name}.weight").removesuffix(".weight")] = linear
        for name, norm in own_norms.items():
            full = builder.layout.disk_name(stored.index, name)
            norms[full], dtypes[full] = norm, tensors[full].dtype
        blocks.append(block)
    original = checkpoint.read_many(spec.tensors, sha256=spec.tensors)
    return Student(
        embed=builder.embedding(first[builder.names.embedding], context.device, torch.float32).requires_grad_(False),
        blocks=[block.forward for block in blocks],
        head=builder.head(head_of({**first, **last}, builder.names), context.device, torch.float32),
        original=builder.head(head_of(original, builder.names), context.device, torch.float32),
        linears=linears,
        norms=norms,
        norm_dtypes=dtypes,
    )


def _store(block: StoredBlock, student: Student, layout: ModelLayout, workspace: Workspace) -> TrainedBlock:
    """The block's shards with what training made of it in the place of what was there."""
    tensors = get_tensors(workspace, block.checkpoint)
    factors: dict[str, Tensor] = {}
    for module in block.formats:
        linear = student.linears[module].stored()
        tensors |= weight_tensors(module, linear.weight)
        if linear.low_rank is not None:
            factors |= factor_tensors(layout.stock_name(module), linear.low_rank)
    for name in student.norms.keys() & tensors.keys():
        tensors[name] = student.norms[name].detach().to(student.norm_dtypes[name])
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    factors = {name: tensor.cpu() for name, tensor in factors.items()}
    return TrainedBlock(
        checkpoint=put_tensors(workspace, tensors),
        adapter=put_tensors(workspace, factors) if factors else None,
        tensors={name: tensor_digest(tensor) for name, tensor in tensors.items()},
        factors={name: tensor_digest(tensor) for name, tensor in factors.items()},
    )


def _tensors(block: StoredBlock, workspace: Workspace) -> dict[str, Tensor]:
    """Everything that is stored of the block."""
    blobs = [blob for blob in (block.checkpoint, block.adapter) if blob is not None]
    return {name: tensor for blob in blobs for name, tensor in get_tensors(workspace, blob).items()}


def _chosen(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def read_texts(context: TaskContext, spec: TrainingSpec, workspace: Workspace) -> list[Text]:
    """What is trained on, and each held-out text."""
    ids = get_tensors(workspace, spec.tokens)["input_ids"].long().to(context.device)
    targets = torch.cat([get_tensors(workspace, blob)["hidden"] for blob in spec.targets]).to(context.device)
    sizes = [spec.trained, *spec.held_out]
    return [Text(ids=own, targets=meant) for own, meant in zip(ids.split(sizes), targets.split(sizes), strict=True)]
