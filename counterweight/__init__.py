"""Counterweight: compensated compression of large language models.

`compress` and `plan` run and foresee a job, `load_model` loads an artifact, `pull` and `verify` fetch and check one; the errors
that they raise say what should be done about them. `docs/python.md` has examples.

The storeys `pipeline`, `workers` and `kernels` are folders of the repository, linked here so that one import package holds
them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from counterweight.pipeline.api import compress, plan, pull, verify
    from counterweight.pipeline.artifact import ArtifactDocument, Published
    from counterweight.pipeline.artifact.load import load_model
    from counterweight.pipeline.manifest import CompressionJob
    from counterweight.pipeline.plan import Plan
    from counterweight.workers.errors import CounterweightError, GateError, RequestError, SurroundingsError

__all__ = [
    "ArtifactDocument",
    "CompressionJob",
    "CounterweightError",
    "GateError",
    "Plan",
    "Published",
    "RequestError",
    "SurroundingsError",
    "compress",
    "load_model",
    "plan",
    "pull",
    "verify",
]

_MODULES = {
    "counterweight.pipeline.api": ("compress", "plan", "pull", "verify"),
    "counterweight.pipeline.artifact": ("ArtifactDocument", "Published"),
    "counterweight.pipeline.artifact.load": ("load_model",),
    "counterweight.pipeline.manifest": ("CompressionJob",),
    "counterweight.pipeline.plan": ("Plan",),
    "counterweight.workers.errors": ("CounterweightError", "GateError", "RequestError", "SurroundingsError"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    # Imported when it is asked for: the command's help need not wait for torch and transformers.
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
