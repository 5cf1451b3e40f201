"""A job's texts as windows of token ids, without torch: read before Ray and workers start."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from counterweight.pipeline.manifest import CompressionJob
from counterweight.pipeline.manifest.job import TextShare
from counterweight.workers.calibration.encoder import Encoder
from counterweight.workers.calibration.source import ModelSamples, TokenSource, TokensSource
from counterweight.workers.calibration.texts import open_text
from counterweight.workers.calibration.windows import Sampling, Windows, encoder, windows

CALIBRATION, VALIDATION, DISTILLATION = "spec.calibration.source", "spec.validation.text", "spec.distillation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job asks of one source. field: where it stands in the manifest. See `calibration.tokens.token_set`."""

    field: str
    source: TokenSource
    length: int
    sequences: int | None
    sampling: Sampling = "consecutive"
    seed: int = 0
    further: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Field of the manifest -> the windows of the text that it names; prepared tokens are not among them. seconds: what reading
    took."""

    found: Mapping[str, Windows]
    seconds: float


def requests(job: CompressionJob) -> Iterator[Request]:
    """Everything that is read before a model runs."""
    calibration, validation, stage = job.spec.calibration, job.spec.validation, job.spec.distillation
    if not isinstance(calibration.source, ModelSamples):
        yield Request(
            field=CALIBRATION,
            source=calibration.source,
            length=calibration.sequence_length,
            sequences=calibration.sequences,
            sampling=calibration.sampling,
            seed=calibration.seed,
            further=(calibration.held_out_sequences, calibration.drawn),
        )
    if validation is not None:
        length = validation.sequence_length or calibration.sequence_length
        yield Request(field=VALIDATION, source=validation.text, length=length, sequences=validation.windows)
    if stage is not None:
        yield from _shares(stage.texts, "texts", calibration.sequence_length)
        yield from _shares(stage.held_out, "held_out", calibration.sequence_length)


def _shares(shares: Sequence[TextShare], name: str, length: int) -> Iterator[Request]:
    for index, share in enumerate(shares):
        field = f"{DISTILLATION}.{name}.{index}.source"
        yield Request(field=field, source=share.source, length=length, sequences=share.skip + share.sequences)


def read_texts(job: CompressionJob, tokenizer: bytes | None) -> Texts:
    """Reads and tokenizes the texts that `job` names, as far as its windows need; RequestError when one does not give what is
    asked of it, or prepared tokens are not there. tokenizer: the model's tokenizer.json."""
    started = time.perf_counter()
    found: dict[str, Windows] = {}
    running: Encoder | None = None
    try:
        for asked in requests(job):
            if isinstance(asked.source, TokensSource):
                open_text(asked.source.uri, asked.field)
                continue
            running = running or encoder(tokenizer, asked.field)
            found[asked.field] = windows(
                asked.source,
                running,
                length=asked.length,
                sequences=asked.sequences,
                sampling=asked.sampling,
                seed=asked.seed,
                field=asked.field,
                further=asked.further,
            )
    finally:
        if running is not None:
            running.close()
    return Texts(found=found, seconds=time.perf_counter() - started)
