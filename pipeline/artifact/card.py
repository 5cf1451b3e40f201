"""An artifact's README.md: the model card that a hub shows, made of the report alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from counterweight.pipeline.artifact.report import Report, labelled
from counterweight.pipeline.artifact.report_html.text import count, recipe_line
from counterweight.workers.ledger import ADAPTER
from counterweight.workers.metrics import METRICS

CARD = "README.md"

FOLDER = "path/of/this/folder"
PLACE = f"file:///{FOLDER}"
"""What stand in a card for where the artifact is, to stock loaders and to ours: `push` puts the repository's name there."""

_HUB = re.compile(r"hf:(?://)?(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@.*)?")
_SNAPSHOT = re.compile(
    r"/models--(?P<owner>[A-Za-z0-9][\w.]*(?:-[\w.]+)*)--(?P<name>[A-Za-z0-9][\w.-]*)/snapshots/", re.ASCII
)
"""Where the hub's client keeps a repository."""

_LICENCE = re.compile(r"(license|licence|copying)(\.(txt|md))?", re.IGNORECASE)


def card(report: Report, files: Iterable[str], *, stock: bool) -> str:
    """Markdown with the hub's metadata. files: of the artifact. stock: whether stock transformers reads its weights; otherwise
    only `counterweight.load_model` does, and transformers behind it."""
    names = sorted(files)
    branch = ADAPTER in names
    licence = next((name for name in names if _LICENCE.fullmatch(name)), None)
    parts = [
        _metadata(report, licence, stock=stock),
        f"# {report.name}",
        f"Compressed by Counterweight {report.software.get('counterweight', '')}: "
        f"{recipe_line(report.recipe)}. {report.bits_per_weight.total:.3f} bits per quantized weight, all in, "
        f"{report.bits_per_weight.model:.3f} of the whole model. Artifact `{report.id}`.",
        _figures(report),
        _loading(branch=branch, stock=stock),
        _limits(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(report: Report, licence: str | None, *, stock: bool) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if (base := hub_id(report.model.uri)) is not None:
        lines += [f"base_model: {base}", "base_model_relation: quantized"]
    if licence is not None:
        lines += ["license: other", f"license_link: {licence}"]
    lines += ["tags:", "- counterweight", f"- {'compressed-tensors' if stock else 'custom-quantization'}"]
    return "\n".join(["---", *lines, "---"])


def hub_id(uri: str) -> str | None:
    """The repository of the hub that a model is: of an `hf:` URI, and of a copy in the cache of the hub's client."""
    if (named := _HUB.fullmatch(uri)) is not None:
        return named["name"]
    kept = _SNAPSHOT.search(uri)
    return None if kept is None else f"{kept['owner']}/{kept['name']}"


def _figures(report: Report) -> str:
    """Each metric under each model."""
    found = labelled(report.qualities)
    if not found:
        return "It was published without validation: nothing was measured on text."
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for metric in METRICS:
        values = [quality.of(metric) for quality in found.values()]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:{metric.digits}}" for value in values]
            lines.append(f"| {metric.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


_WITH_PEFT = f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{FOLDER}")
model.hf_quantizer.compressor.decompress_model(model)
model = PeftModel.from_pretrained(model, "{FOLDER}", subfolder="compensation")
```"""


def _loading(*, branch: bool, stock: bool) -> str:
    ours = '```python\nimport counterweight\n\nmodel = counterweight.load_model("' + PLACE + '")\n```'
    if not stock:
        return (
            f"{ours}\n\nOr, after `import counterweight.auto`, `AutoModelForCausalLM.from_pretrained`. Stock transformers and "
            "vLLM refuse it: they would run it wrongly."
        )
    if branch:
        return (
            f"{ours}\n\nStock transformers, with compressed-tensors, loads the quantized model without its low-rank "
            f"branch, and PEFT the branch, from `compensation/`:\n\n{_WITH_PEFT}"
        )
    return f"Stock transformers, with compressed-tensors, and vLLM load it as it is; so does Counterweight:\n\n{ours}"


def _limits(report: Report) -> str:
    text = f"Every byte can be checked: `counterweight verify {PLACE}`. What was done to each layer is in `report/`."
    if report.validation is None:
        return text
    windows = count(report.validation.sequences, "window")
    tokens = count(report.validation.sequence_length, "token")
    return (
        f"Figures are of {windows} of {tokens} of one text, in {report.validation_dtype}: they say how far the model is from "
        f"its original there, and nothing of other texts, tasks or languages. {text}"
    )
