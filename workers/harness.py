"""Tasks of EleutherAI's lm-evaluation-harness on a model in memory: no network, no code of a task's, item by item.

The harness is the extra `counterweight[lm-eval]`. Its templates (Jinja, not sandboxed) are code: a task file is to be trusted
as a program is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from counterweight.workers.config import Config
from counterweight.workers.errors import RequestError
from counterweight.workers.footprint.whole import BATCH
from counterweight.workers.tasks.harness import TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MISSING = "lm-evaluation-harness is not installed here: pip install 'counterweight[lm-eval]'"


class TaskDocument(Config):
    """A task: its config as the harness has it, without its data set, and the rows of each split in its place. num_fewshot:
    worked examples before each item; None: as the config says. limit: items that are asked, from the first; None: all."""

    config: Mapping[str, JsonValue]
    rows: Mapping[str, tuple[Mapping[str, JsonValue], ...]]
    num_fewshot: int | None = None
    limit: int | None = None


class Documents(Config):
    """Everything that a model needs to be asked, by whichever worker. tasks: by name. tokenizer: file -> its text."""

    tasks: Mapping[str, TaskDocument]
    tokenizer: Mapping[str, str]


def installed() -> bool:
    """Whether the harness is there."""
    return find_spec("lm_eval") is not None


def ask(model: PreTrainedModel, documents: Documents) -> dict[str, TaskScore]:
    """Task -> what `model` scores. RequestError without the harness, and for what it says of a task."""
    if not installed():
        raise RequestError(f"spec.validation.tasks: {MISSING}")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in documents.tokenizer.items():
            (Path(folder) / name).write_text(text)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    return {name: _score(language_model, name, task) for name, task in documents.tasks.items()}


def _score(language_model: object, name: str, task: TaskDocument) -> TaskScore:
    import datasets
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    splits = {split: datasets.Dataset.from_list([dict(row) for row in rows]) for split, rows in task.rows.items()}
    config = {**task.config, "task": name, "custom_dataset": lambda **_: datasets.DatasetDict(splits)}
    if task.num_fewshot is not None:
        config["num_fewshot"] = task.num_fewshot
    try:
        found = simple_evaluate(
            model=language_model,
            tasks=[ConfigurableTask(config=config)],
            limit=task.limit,
            log_samples=True,
            bootstrap_iters=0,
        )
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, TemplateError) as error:
        said = " ".join(str(error).split())[:300]
        raise RequestError(
            f"spec.validation.tasks.{name}: the harness refuses it: {type(error).__name__}: {said}"
        ) from error
    scores = {
        _metric(key): float(value)
        for key, value in found["results"][name].items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }
    samples: Sequence[Mapping[str, object]] = found["samples"][name]
    items: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda each: int(str(each["doc_id"]))):
        for metric in scores:
            plain, _, filtered = metric.partition(",")
            value = sample.get(plain)
            if sample["filter"] == (filtered or "none") and isinstance(value, int | float):
                items.setdefault(metric, []).append(float(value))
    better: Mapping[str, bool] = found["higher_is_better"][name]
    return TaskScore(
        items={metric: tuple(values) for metric, values in items.items()},
        scores=scores,
        higher_is_better={metric: bool(better.get(metric.partition(",")[0], True)) for metric in scores},
    )


def _metric(key: str) -> str:
    """`acc` for `acc,none`; with the name of a filter that is one."""
    return key.removesuffix(",none")
