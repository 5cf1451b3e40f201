"""A job's token sets: what calibrates the model and what it is measured on."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipeline.manifest import CompressionJob
from pipeline.model_source import ModelSource
from workers.calibration.tokens import TokenSet, token_set


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The token sets of a job. validation: None when it asks for none. seconds: what reading both took."""

    calibration: TokenSet
    validation: TokenSet | None
    seconds: float


def read_tokens(job: CompressionJob, source: ModelSource) -> Tokens:
    """Reads and tokenizes the texts that `job` names; RequestError when one does not give what is asked of it."""
    started = time.perf_counter()
    tokenizer = source.tokenizer()
    vocabulary = source.anatomy.vocabulary
    calibration, validation = job.spec.calibration, job.spec.validation
    first = token_set(
        calibration.source,
        tokenizer,
        vocabulary=vocabulary,
        length=calibration.sequence_length,
        sequences=calibration.sequences,
        sampling=calibration.sampling,
        seed=calibration.seed,
        field="spec.calibration.source",
    )
    second = None
    if validation is not None:
        second = token_set(
            validation.text,
            tokenizer,
            vocabulary=vocabulary,
            length=validation.sequence_length or calibration.sequence_length,
            sequences=validation.windows,
            sampling="consecutive",
            seed=0,
            field="spec.validation.text",
        )
    return Tokens(calibration=first, validation=second, seconds=time.perf_counter() - started)
