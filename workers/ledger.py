"""An artifact's ledger: what became of every source tensor, how every quantized one is to be read; and where files lie."""

from __future__ import annotations

from collections.abc import Mapping

from counterweight.workers.checkpoint.beside import SideFile
from counterweight.workers.config import Config
from counterweight.workers.formats import ModuleFormat
from counterweight.workers.tasks.records import LedgerEntry

LEDGER = "ledger.json"
RESIDUAL_STORE = "residual/residual.safetensors"
ADAPTER = "compensation/adapter_model.safetensors"
ADAPTER_CONFIG = "compensation/adapter_config.json"


class Ledger(Config):
    """The account of an artifact's tensors, and of the source's files.

    entries: what became of each source tensor. files: of each file beside the source's weights. formats: quantized linear ->
    how it is stored. tensors: every stored tensor (checkpoint, adapter and residual store) -> sha256 of its dtype, shape and
    bytes.
    """

    schema_version: int = 1
    entries: tuple[LedgerEntry, ...]
    formats: Mapping[str, ModuleFormat]
    tensors: Mapping[str, str]
    files: tuple[SideFile, ...] = ()
