"""Several compressed models side by side: what each costs in bits and what it is worth on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from counterweight.pipeline.artifact import open_artifact
from counterweight.pipeline.artifact.report import Quality, Report, TextReport
from counterweight.pipeline.evaluate import measurable
from counterweight.pipeline.judging.foreign import Foreign, is_ours
from counterweight.pipeline.judging.rivals import read_report
from counterweight.pipeline.judging.wanted import Wanted
from counterweight.pipeline.judging.yardstick import Yardstick, device_of
from counterweight.pipeline.model_source import open_model
from counterweight.workers.errors import RequestError

OURS, ORIGINAL = "counterweight", "original"


@dataclass(frozen=True, slots=True)
class Row:
    """A model. kind: `counterweight`, what another tool calls its method, `plain`, or `original`. bytes: of the files of its
    weights; bits: the same over the original's number of weights. texts: name of a text -> what the model is worth there."""

    name: str
    uri: str
    kind: str
    bytes: int
    bits: float
    texts: Mapping[str, Quality]

    def facts(self) -> dict[str, object]:
        """As JSON."""
        worth = {name: quality.model_dump() for name, quality in self.texts.items()}
        return {
            "name": self.name,
            "uri": self.uri,
            "kind": self.kind,
            "bytes": self.bytes,
            "bits": self.bits,
            "texts": worth,
        }


def compare(uris: Sequence[str], wanted: Wanted | None = None) -> tuple[Row, ...]:
    """The original, then each model in the order given.

    uris: artifacts of ours, checkpoints that transformers loads. wanted: without an original, that of the first artifact of
    ours, or else the first plain model; texts and lengths that are not given are those of the first report. RequestError for a
    model that cannot be loaded, and for an artifact that was made from another original.
    """
    wanted = wanted or Wanted()
    device = device_of(wanted.device)
    ours = {uri: read_report(uri) for uri in uris if is_ours(uri)}
    others = {uri: Foreign.open(uri) for uri in uris if uri not in ours}
    source = open_model(wanted.against or _original(ours, others))
    first = next(iter(ours.values()), None)
    asked = measurable(source, wanted, first)
    weights = source.parameters
    rows: list[Row] = []
    dtype = "float32" if first is None else first.validation_dtype
    with Yardstick(source, asked.tokens, dtype, device, wanted.note) as yardstick:
        for uri in uris:
            foreign = others.get(uri)
            windows = yardstick.judge(uri) if foreign is None else foreign.judge(yardstick)
            found = windows.by_text(asked.about)
            if not rows:
                stored = sum(source.checkpoint.entry(name).length for name in source.tensors)
                worth = {name: text.baseline for name, text in found.items()}
                rows.append(Row(ORIGINAL, source.uri, ORIGINAL, stored, 8 * stored / weights, worth))
            rows.append(_row(uri, foreign, found, weights))
    return tuple(rows)


def _row(uri: str, foreign: Foreign | None, found: Mapping[str, TextReport], weights: int) -> Row:
    worth = {name: text.compensated for name, text in found.items()}
    if foreign is not None:
        return Row(foreign.folder.name, uri, foreign.kind, foreign.bytes, 8 * foreign.bytes / weights, worth)
    _, document = open_artifact(uri)
    stored = sum(file.size for path, file in document.files.items() if path.endswith(".safetensors"))
    return Row(f"{document.name}/{document.id[:8]}", uri, OURS, stored, 8 * stored / weights, worth)


def _original(ours: Mapping[str, Report], others: Mapping[str, Foreign]) -> str:
    if ours:
        return next(iter(ours.values())).model.uri
    plain = next((uri for uri, foreign in others.items() if foreign.kind == "plain"), None)
    if plain is None:
        raise RequestError("--against: expected the original: no artifact of ours is among the models to name it")
    return plain
