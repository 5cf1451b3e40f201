"""Where a checkpoint keeps its text model, and what a multimodal model has beside it. Plain data, free of torch."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

_MODEL = "model."
"""Before the names of a multimodal model's parts, or not: that depends on the version of transformers that wrote them."""


@dataclass(frozen=True, slots=True)
class TextNames:
    """What a checkpoint calls the parts of a text model. base: prefix of embedding, blocks and final norm. head: weight of the
    lm_head."""

    base: str = "model."
    head: str = "lm_head.weight"

    @property
    def embedding(self) -> str:
        """Weight of the embedding."""
        return f"{self.base}embed_tokens.weight"

    @property
    def norm(self) -> str:
        """Weight of the final norm."""
        return f"{self.base}norm.weight"

    @property
    def blocks(self) -> str:
        """Prefix of every block's names; the index and a dot follow."""
        return f"{self.base}layers."

    def among(self, stored: Container[str]) -> bool:
        """Whether a checkpoint with these tensors has these names. A tied model may have no head."""
        return self.embedding in stored


INNER_NAMES = (
    TextNames("model.language_model.", "lm_head.weight"),
    TextNames("language_model.model.", "language_model.lm_head.weight"),
)
"""Of transformers' multimodal models with a `language_model` inside: their modules, and what checkpoints have from before those
were called like this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """A multimodal model around a text model: the text model is compressed, all else is carried over as it is.

    text_types: what `text_config.model_type` may be. beside: modules outside the text model (towers, projectors); in tensor
    names `model.` may stand before them. writes: linears among them whose output enters the residual stream at the places of
    images: where the stream is rotated, their output is too.
    """

    text_types: tuple[str, ...]
    beside: tuple[str, ...]
    writes: tuple[str, ...] = ()

    def holds(self, tensor: str) -> bool:
        """Whether a tensor lies outside the text model."""
        return tensor.removeprefix(_MODEL).startswith(tuple(f"{module}." for module in self.beside))

    def writes_residual(self, tensor: str) -> bool:
        """Whether a tensor is the weight or bias of a linear whose output enters the residual stream."""
        return tensor.removeprefix(_MODEL).rpartition(".")[0] in self.writes

    @property
    def ignored(self) -> tuple[str, ...]:
        """The modules outside the text model in compressed-tensors' words."""
        return tuple(f"re:(model[.])?{re.escape(module)}[.].*" for module in self.beside)
