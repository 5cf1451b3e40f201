"""Validates a published artifact again, in this process, against the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import TypeAdapter, ValidationError

from counterweight.pipeline.artifact import REPORT
from counterweight.pipeline.artifact.report import Report, TextReport, TokensReport, tokens_report
from counterweight.pipeline.judging.rivals import read_report
from counterweight.pipeline.judging.wanted import Wanted
from counterweight.pipeline.judging.yardstick import Yardstick, device_of
from counterweight.pipeline.manifest import TEXT
from counterweight.pipeline.model_source import ModelSource, open_model
from counterweight.pipeline.texts import usual_special_tokens
from counterweight.workers.calibration.source import SpecialTokens, TextSource, TokenSource
from counterweight.workers.calibration.tokens import TokenSet, token_set
from counterweight.workers.config import first_problem
from counterweight.workers.errors import CheckpointError, RequestError


@dataclass(frozen=True, slots=True)
class Measurable:
    """Texts as windows of equal length. about: name -> what each is, in order; tokens: all, one text behind the other."""

    about: dict[str, TokensReport]
    tokens: TokenSet


@dataclass(frozen=True, slots=True)
class _Text:
    """A text before it is cut into windows. sequences: how many, None for all."""

    source: TokenSource
    length: int
    sequences: int | None
    special_tokens: SpecialTokens


def evaluate_artifact(uri: str, wanted: Wanted | None = None) -> dict[str, TextReport]:
    """Name of a text -> what all models are worth on it, as in a report: the original, quantized, compensated.

    What is not given is taken from the artifact's own report, each of its texts too. RequestError when the report has no text
    to repeat, or when the model at hand is not the one that the artifact was made from.
    """
    wanted = wanted or Wanted()
    device = device_of(wanted.device)
    report = read_report(uri)
    source = open_model(wanted.against or report.model.uri)
    asked = measurable(source, wanted, report)
    with Yardstick(source, asked.tokens, report.validation_dtype, device, wanted.note) as yardstick:
        return yardstick.judge(uri).by_text(asked.about)


def measurable(source: ModelSource, wanted: Wanted, report: Report | None) -> Measurable:
    """The windows that are to be measured on, through the model's tokenizer. report: what is not given is taken from it."""
    for option, value, least in (("--windows", wanted.windows, 1), ("--sequence-length", wanted.sequence_length, 2)):
        if value is not None and value < least:
            raise RequestError(f"{option}: {value}: expected at least {least}")
    about: dict[str, TokensReport] = {}
    ids: list[torch.Tensor] = []
    tokenizer, vocabulary = source.tokenizer(), source.layout.vocabulary
    for name, text in _texts(source, wanted, report).items():
        field = "--text" if name == TEXT else f"--text ({name!r} of the report)"
        tokens = token_set(
            text.source,
            tokenizer,
            length=text.length,
            sequences=text.sequences,
            sampling="consecutive",
            seed=0,
            field=field,
            special_tokens=text.special_tokens,
        ).within(vocabulary, field)
        about[name] = tokens_report(text.source, tokens, special_tokens=text.special_tokens)
        ids.append(tokens.ids)
    return Measurable(about, TokenSet(torch.cat(ids)))


def _texts(source: ModelSource, wanted: Wanted, report: Report | None) -> dict[str, _Text]:
    if wanted.text is not None:
        length = wanted.sequence_length or (
            None if report is None else _length(report.validation or report.calibration)
        )
        if length is None:
            raise RequestError(
                "--sequence-length: expected one: no artifact among the models has a report that names it"
            )
        specials = usual_special_tokens(source.checkpoint.config)
        return {TEXT: _Text(TextSource(uri=wanted.text), length, wanted.windows, specials)}
    if report is None:
        raise RequestError(
            "--text: no artifact among the models has a report that names one: expected a text to measure on"
        )
    if report.validation is None:
        raise RequestError("--text: the artifact was published without validation: expected a text to measure on")
    told = {TEXT: report.validation, **{name: text.tokens for name, text in report.texts.items()}}
    return {
        name: _Text(
            _source(tokens),
            wanted.sequence_length or _length(tokens),
            wanted.windows or _sequences(tokens),
            tokens.special_tokens,
        )
        for name, tokens in told.items()
    }


def _source(tokens: TokensReport) -> TokenSource:
    try:
        source: TokenSource = TypeAdapter(TokenSource).validate_python(dict(tokens.source))
    except ValidationError as error:
        raise CheckpointError(f"{REPORT}: validation.source: {first_problem(error)}") from error
    return source


def _length(tokens: TokensReport) -> int:
    if tokens.sequence_length < 2:
        raise CheckpointError(f"{REPORT}: sequence_length: {tokens.sequence_length}: expected at least 2")
    return tokens.sequence_length


def _sequences(tokens: TokensReport) -> int:
    if tokens.sequences < 1:
        raise CheckpointError(f"{REPORT}: validation.sequences: {tokens.sequences}: expected at least 1")
    return tokens.sequences
