"""The source model of a job: where its checkpoint lies, opened from headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from counterweight.pipeline.model_files import resolve, tokenizer_of
from counterweight.workers.calibration.windows import TokenizerFiles
from counterweight.workers.checkpoint.catalogue import Catalogue
from counterweight.workers.errors import CheckpointError
from counterweight.workers.models.config_values import check_layers
from counterweight.workers.models.families import family_of
from counterweight.workers.models.layout import ModelLayout
from counterweight.workers.models.plain import plain_layout
from counterweight.workers.storage import ObjectStore, open_store

IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors that old exports hold and no model needs: the frequencies follow from the config."""


@dataclass(frozen=True)
class ModelSource:
    """An opened checkpoint that matches its architecture: exact names, shapes and float dtypes."""

    uri: str
    store: ObjectStore
    checkpoint: Catalogue
    layout: ModelLayout

    @cached_property
    def dropped(self) -> Mapping[str, str]:
        """Tensors that the artifact leaves out -> why."""
        reasons = dict(self.checkpoint.parts)
        for name in (*self.checkpoint.names, *self.checkpoint.parts):
            if IGNORED.fullmatch(name):
                reasons[name] = "follows from the config"
            elif self.layout.predicts_further(name):
                reasons[name] = "of a layer for multi-token prediction, which is not run"
        return reasons

    @property
    def tensors(self) -> tuple[str, ...]:
        """Tensors that count."""
        return tuple(name for name in self.checkpoint.names if name not in self.dropped)

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Those of what a multimodal model has beside its text model, in whatever shape and dtype they are."""
        return tuple(name for name in self.tensors if self.layout.is_beside(name))

    def block_tensors(self, index: int) -> tuple[str, ...]:
        """Tensors that block `index` is made from."""
        return self._tensors_of_blocks[index]

    @cached_property
    def _tensors_of_blocks(self) -> tuple[tuple[str, ...], ...]:
        names = frozenset(self.checkpoint.names)
        blocks = (self.layout.sources(index, names).values() for index in range(self.layout.blocks))
        return tuple(tuple(dict.fromkeys(part.source for part in parts)) for parts in blocks)

    @property
    def parameters(self) -> int:
        """Weights of the whole model, shared ones once."""
        return sum(prod(self.checkpoint.entry(name).shape) for name in self.tensors)

    def tokenizer(self) -> TokenizerFiles | None:
        """The tokenizer's files; None without a tokenizer.json."""
        return tokenizer_of(self.store)


def describe(config: Mapping[str, Any], stored: frozenset[str]) -> ModelLayout:
    """The layout of the model with this config.json; takes transformers, a second to import, unless the model is plain. stored:
    as for `BlockBuilder`."""
    if (plain := plain_layout(config, stored)) is not None:
        return plain
    from counterweight.workers.models.block_builder import BlockBuilder

    return BlockBuilder(config, stored).layout


def open_model(
    uri: str, describe: Callable[[Mapping[str, Any], frozenset[str]], ModelLayout] = describe
) -> ModelSource:
    """Opens `file:`, `s3:` or `hf:` (a hub repository, downloaded to the local cache first) and checks the checkpoint
    against its architecture.

    describe: who says what that architecture is; by default this process, and for a process that would rather not load
    transformers another one. CheckpointError, UnsupportedModelError, RequestError, StorageError.
    """
    root = resolve(uri)
    store = open_store(root)
    checkpoint = Catalogue.open(store)
    check_layers(checkpoint.config, (*checkpoint.names, *checkpoint.parts))
    ends = family_of(checkpoint.config.get("model_type")).ends
    layout = describe(checkpoint.config, ends.intersection(checkpoint.names))
    source = ModelSource(root, store, checkpoint, layout)
    # A tied model's head may be stored or not; when it is, `inventory` compares it with the embedding.
    optional = [*source.dropped, *source.beside, *([layout.names.head] if layout.tied else [])]
    checkpoint.expect(layout.expected(checkpoint.names), optional=optional)
    return source


def check_stored_head(source: ModelSource, digests: Mapping[str, str]) -> None:
    """A tied model whose stored head is not its embedding is not tied: CheckpointError."""
    head, embedding = source.layout.names.head, source.layout.names.embedding
    if source.layout.tied and head in digests and digests[head] != digests[embedding]:
        raise CheckpointError(
            f"{source.uri}: config.json: tie_word_embeddings: true: but {head} differs from {embedding}"
        )
