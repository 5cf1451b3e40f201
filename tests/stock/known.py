"""Artifacts known to transformers for a while: other tests hold that it refuses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING

from counterweight.pipeline.artifact.auto import register


@contextmanager
def known_to_transformers() -> Iterator[None]:
    """What `import counterweight.auto` does, undone at the end."""
    register()
    try:
        yield
    finally:
        for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, TOKENIZER_MAPPING):
            for key in list(mapping._extra_content):
                if "ounterweight" in str(key):
                    del mapping._extra_content[key]
