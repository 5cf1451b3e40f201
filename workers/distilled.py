"""The life of a distillation: a stored model is read, trained epoch by epoch, and stored again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from counterweight.workers.checkpoint.digest import tensor_digest
from counterweight.workers.clock import Clock
from counterweight.workers.compressed import read_block
from counterweight.workers.context import TaskContext
from counterweight.workers.distillation.trainable import TrainableLinear, make_trainable
from counterweight.workers.distillation.training import State, Student, Text, Training
from counterweight.workers.interchange.compressed_tensors import weight_tensors
from counterweight.workers.interchange.peft import factor_tensors
from counterweight.workers.keys import digest
from counterweight.workers.memory import release
from counterweight.workers.models.block_builder import Block
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.models.source import head_of
from counterweight.workers.tasks.distill import Distill, DistillRecord, EpochRecord, StoredBlock, TrainedBlock
from counterweight.workers.workspace import Blob, Workspace

EPOCH = "distill-epoch"


def distilled(context: TaskContext, task: Distill, workspace: Workspace) -> DistillRecord:
    """The task's record: 1. read the model and the texts, 2. train from the last epoch that is committed, 3. store."""
    clock = Clock(context.device)
    student = read_student(context, task, workspace)
    text, *held_out = read_texts(context, task, workspace)
    clock.lap("load")
    training = Training(student, text, held_out, task.options)
    state, blobs = _resumed(task, workspace, context.device)
    state = state or training.begin()
    while not training.finished(state):
        state = training.epoch(state)
        blobs.append(_commit(task, workspace, state))
        for old in blobs[:-1]:
            workspace.discard(old)
        del blobs[:-1]
    clock.lap("solve")
    trained: dict[int, TrainedBlock] = {}
    if state.best:
        training.settle(state)
        layout = context.source(task.setting)[1].layout
        trained = {block.index: _store(block, student, layout, workspace) for block in task.blocks}
    clock.lap("write")
    del student, training
    release(context.device)
    return DistillRecord(
        kept=state.best,
        divergences=state.divergences,
        losses=state.losses,
        blocks=trained,
        states=tuple(blobs[-1:]),
        timing=clock.timing(),
    )


def read_student(context: TaskContext, task: Distill, workspace: Workspace) -> Student:
    """The compressed model, ready to be trained in float32."""
    checkpoint, builder = context.source(task.setting)
    first, last = (workspace.get_tensors(blob) for blob in task.outside)
    blocks: list[Block] = []
    linears: dict[str, TrainableLinear] = {}
    norms: dict[str, nn.Parameter] = {}
    dtypes: dict[str, torch.dtype] = {}
    for stored in task.blocks:
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
    original = checkpoint.read_many(task.tensors, sha256=task.tensors)
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
    tensors = workspace.get_tensors(block.checkpoint)
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
        checkpoint=workspace.put_tensors(tensors),
        adapter=workspace.put_tensors(factors) if factors else None,
        tensors={name: tensor_digest(tensor) for name, tensor in tensors.items()},
        factors={name: tensor_digest(tensor) for name, tensor in factors.items()},
    )


def _tensors(block: StoredBlock, workspace: Workspace) -> dict[str, Tensor]:
    """Everything that is stored of the block."""
    blobs = [blob for blob in (block.checkpoint, block.adapter) if blob is not None]
    return {name: tensor for blob in blobs for name, tensor in workspace.get_tensors(blob).items()}


def _chosen(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def read_texts(context: TaskContext, task: Distill, workspace: Workspace) -> list[Text]:
    """What is trained on, and each held-out text."""
    ids = workspace.get_tensors(task.tokens)["input_ids"].long().to(context.device)
    targets = torch.cat([workspace.get_tensors(blob)["hidden"] for blob in task.targets]).to(context.device)
    sizes = [task.trained, *task.held_out]
    return [Text(ids=own, targets=meant) for own, meant in zip(ids.split(sizes), targets.split(sizes), strict=True)]


def _resumed(task: Distill, workspace: Workspace, device: torch.device) -> tuple[State | None, list[Blob]]:
    """The state behind the last epoch that was committed and whose tensors are there, with its blob; None and no blob where
    training has not begun."""
    found: EpochRecord | None = None
    for epoch in range(1, task.options.epochs + 1):
        record = workspace.lookup(EPOCH, _epoch_key(task, epoch), EpochRecord)
        if record is None:
            break
        found = record if workspace.has(record.state) else found
    if found is None:
        return None, []
    tensors = {name: tensor.to(device) for name, tensor in workspace.get_tensors(found.state).items()}
    state = State(
        epoch=len(found.losses),
        tensors=tensors,
        best=found.best,
        divergences=found.divergences,
        losses=found.losses,
    )
    return state, [found.state]


def _commit(task: Distill, workspace: Workspace, state: State) -> Blob:
    blob = workspace.put_tensors({name: tensor.cpu() for name, tensor in state.tensors.items()})
    record = EpochRecord(state=blob, best=state.best, divergences=state.divergences, losses=state.losses)
    return workspace.commit(EPOCH, _epoch_key(task, state.epoch), record).state


def _epoch_key(task: Distill, epoch: int) -> str:
    return digest([task.key(), epoch])
