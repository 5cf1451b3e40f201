"""An original model that others are measured against, in this process: what it makes of some windows, and what they do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.model_source import ModelSource
from counterweight.pipeline.validate import Windows
from counterweight.workers.calibration.tokens import TokenSet
from counterweight.workers.context import DTYPES
from counterweight.workers.dtypes import ModelDtype
from counterweight.workers.errors import RequestError
from counterweight.workers.keys import digest
from counterweight.workers.ledger import LEDGER
from counterweight.workers.models.source import read_head
from counterweight.workers.passing import receive
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.evaluate import Evaluate
from counterweight.workers.tasks.inspect import Inspect
from counterweight.workers.tasks.original import Original, OriginalRecord
from counterweight.workers.tasks.setting import Device, Setting
from counterweight.workers.tensor_blobs import put_tensors
from counterweight.workers.worker import Worker
from counterweight.workers.workspace import Workspace


def device_of(name: str) -> Device:
    """The device that an option names. RequestError where this machine does not have it."""
    if name == "cpu":
        return "cpu"
    if name != "cuda":
        raise RequestError(f"--device: {name!r}: expected cpu or cuda")
    if not torch.cuda.is_available():
        raise RequestError("--device: cuda: torch finds no GPU on this machine: expected cpu")
    return "cuda"


class Yardstick:
    """An original on a token set. A context manager: what it computes lies in a folder that goes with it.

    tokens: all windows. note: told what is being done.
    """

    def __init__(
        self, source: ModelSource, tokens: TokenSet, dtype: ModelDtype, device: Device, note: Callable[[str], None]
    ) -> None:
        self.source, self.tokens, self.dtype, self.note = source, tokens, dtype, note
        self.worker = Worker(device, threads=len(os.sched_getaffinity(0)))
        self._scratch = tempfile.TemporaryDirectory()
        note(f"reading {source.uri}")
        inspected = self.worker.run(Inspect(source.uri, source.tensors))
        self.digests: Mapping[str, str] = {name: found.sha256 for name, found in inspected.items()}
        place = Path(self._scratch.name).as_uri()
        self.workspace = Workspace(open_store(place))
        self.original = Original(
            setting=Setting(
                source=source.uri,
                config=source.checkpoint.config,
                workspace=place,
                compute_dtype="float32",
                device=device,
            ),
            tensors=self.digests,
            tokens=put_tensors(self.workspace, {"input_ids": tokens.ids}),
            start=0,
            stop=tokens.sequences,
            dtype=dtype,
        )
        self._found: OriginalRecord | None = None

    @property
    def found(self) -> OriginalRecord:
        """What the original makes of the windows; computed once."""
        if self._found is None:
            self.note(f"the original on {self.tokens.sequences} windows of {self.tokens.length} tokens")
            self._found = self.worker.run(self.original)
        return self._found

    @cached_property
    def _head(self) -> nn.Module:
        checkpoint, builder = self.worker.context.source(self.original.setting)
        tensors = read_head(checkpoint, builder, self.digests)
        return builder.head(tensors, self.worker.context.device, DTYPES[self.dtype])

    @torch.no_grad()
    def log_probabilities(self, batch: int) -> Tensor:
        """The original's, of the next token, of a batch of windows: [windows, length, vocabulary] float32."""
        hidden = receive(self.worker.context, self.workspace, self.found.outputs[batch])
        return functional.log_softmax(self._head(hidden).float(), dim=-1)

    def judge(self, uri: str) -> Windows:
        """An artifact of ours on the windows, under every variant. RequestError when it was made from another model."""
        store, document = open_artifact(uri)
        if (own := digest(dict(self.digests))) != document.base_model.digest:
            raise RequestError(
                f"{self.source.uri}: digest {own[:16]}: expected {document.base_model.digest[:16]}, the model that "
                f"{document.name} was made from"
            )
        found = self.found
        self.note(f"{document.name} {document.id} on the same windows")
        ledger = document.files[LEDGER].sha256
        windows = Windows()
        windows.add(self.worker.run(Evaluate(original=self.original, found=found, artifact=store.uri, ledger=ledger)))
        return windows

    def __enter__(self) -> Yardstick:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.close()
        self._scratch.cleanup()
