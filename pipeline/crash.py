"""What is left of an error that nobody foresaw: one line for whoever ran the command, a file for whoever mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGES = ("counterweight", "torch", "transformers", "ray", "tokenizers", "datasets", "safetensors", "pydantic")
"""Whose versions stand in a crash file."""

MAX_FRAMES = 100
"""Of a traceback; an endless recursion has thousands."""

MAX_LINE = 300

_SECRET = re.compile(r"(?i).*(key|secret|token|password|credential|signature).*")
_LEAST_SECRET = 6
"""Characters; a shorter value would also blot out words that are no secret."""

_USER = re.compile(r"(?<=://)[^/@\s\"']+@")
_QUERY = re.compile(r"(\w:/?/?[^\s\"'?]*)\?[^\s\"']+")


def report_crash(error: BaseException, arguments: Sequence[str]) -> str:
    """Writes a crash file, below $XDG_STATE_HOME or in the folder for temporary files; the line that names it.

    It holds the traceback, versions and the command's arguments, without secrets. arguments: those of the command.
    """
    said = " ".join(without_secrets(str(error), os.environ).split())[:MAX_LINE]
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    text = without_secrets(_text(error, arguments), os.environ)
    where = "no crash file could be written"
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix=time.strftime("crash-%Y%m%d-%H%M%S-"), suffix=".txt", dir=folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        where = f"details are in {path}"
        break
    return f"a defect of counterweight ({what}): {where}"


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """`text` without the values of variables whose names speak of secrets, users in URIs, and what follows a URI's `?`."""
    values = {value for name, value in environment.items() if _SECRET.fullmatch(name) and len(value) >= _LEAST_SECRET}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))


def folders() -> list[Path]:
    """Where files for whoever mends something are written, the best first."""
    state = os.environ.get("XDG_STATE_HOME")
    own = [Path(state) / "counterweight"] if state and os.path.isabs(state) else []
    return [*own, Path(tempfile.gettempdir())]


def _text(error: BaseException, arguments: Sequence[str]) -> str:
    versions = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    trace = "".join(traceback.format_exception(error, limit=-MAX_FRAMES, chain=True))
    shown = " ".join(repr(_shown(argument)) for argument in arguments)
    return "\n".join([f"counterweight {shown}", *versions, f"executable {sys.executable}", "", trace])


def _shown(argument: str) -> str:
    """An argument as it may be shown: of `field=value` whose field speaks of a secret, the field."""
    name, sign, _ = argument.partition("=")
    return f"{name}=***" if sign and _SECRET.fullmatch(name) else argument
