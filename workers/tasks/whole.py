"""What tasks share that run one model as a whole: the original, or a variant of an artifact that was made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from counterweight.workers.config import Config
from counterweight.workers.dtypes import ModelDtype
from counterweight.workers.storage import open_store
from counterweight.workers.tasks.evaluate import BASELINE, QUANTIZED
from counterweight.workers.tasks.setting import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from counterweight.workers.context import TaskContext


class WholeModel(Config):
    """One model, which has to fit into a worker's memory."""

    setting: Setting
    tensors: Mapping[str, str]
    """Every source tensor -> sha256."""
    dtype: ModelDtype
    """Type that the model computes in."""
    variant: str
    """`workers.tasks.evaluate.VARIANTS`."""
    artifact: str = ""
    """Root URI of the artifact's files; of nothing for the original."""
    ledger: str = ""
    """sha256 of its ledger."""

    def determines(self) -> list[object]:
        """The part of a key that says which model it is."""
        shared = {**self.setting.uncompressed().determines(), "compute_dtype": self.dtype}
        return [shared, dict(self.tensors), self.variant, self.ledger]

    def model(self, context: TaskContext, *, decode_only: bool) -> PreTrainedModel:
        """The model in memory. decode_only: residual stores leave a text that is given whole alone (`block.install`)."""
        from counterweight.workers.compressed import CompressedModel
        from counterweight.workers.context import DTYPES
        from counterweight.workers.models.source import whole
        from counterweight.workers.whole_model import assembled

        dtype = DTYPES[self.dtype]
        if self.variant == BASELINE:
            checkpoint, builder = context.source(self.setting.uncompressed())
            return whole(checkpoint, builder, context.device, dtype)
        model = CompressedModel.open(open_store(self.artifact), ledger_sha256=self.ledger)
        compensated = self.variant != QUANTIZED
        return assembled(model, context.device, dtype, compensated=compensated, decode_only=decode_only)
