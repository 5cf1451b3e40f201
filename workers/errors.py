"""The errors that leave a storey, classed by what the user should do about them.

The command line maps each class to an exit code (`exit_code`), so raising the right class *is* the contract of
DESIGN section 4: 2 the request is wrong, 3 a gate failed, 4 the surroundings failed and a retry makes sense.
"""

from __future__ import annotations


class CounterweightError(Exception):
    """Base of every error that Counterweight raises on purpose; its text is one clear line for the user."""

    exit_code = 1


class RequestError(CounterweightError):
    """The request is wrong: a manifest, an argument, a model, a text. Trying again will not help."""

    exit_code = 2


class UnknownIdError(RequestError):
    """There is no job, batch or schedule of this id."""


class ManifestError(RequestError):
    """A manifest (or an override of one) does not describe a job; each line names a field, its value and what is expected."""


class CheckpointError(RequestError):
    """A source checkpoint or an artifact's tensors are not what they claim to be."""


class UnsupportedModelError(RequestError):
    """The model's architecture (or a feature of it) is not in the tables."""


class GateError(CounterweightError):
    """A validation gate failed; nothing was published."""

    exit_code = 3


class SurroundingsError(CounterweightError):
    """Storage, cluster or machine failed in a way that a retry may mend."""

    exit_code = 4


class StorageError(SurroundingsError):
    """An object store refused, timed out or broke off; the text names the operation, the URI and the cause."""


class IntegrityError(StorageError):
    """Bytes read are not the bytes that were written: the sha256 or the size differs from the recorded one."""


class ObjectNotFoundError(StorageError):
    """No object under this key."""


class WorkerError(SurroundingsError):
    """A task failed more often than its retry budget allows, or the cluster cannot hold it."""


class OutOfMemoryError(SurroundingsError):
    """The system, a limit or a GPU refused memory to a worker: others may give some back, and another worker may have more."""
