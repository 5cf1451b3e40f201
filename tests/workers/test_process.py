"""What a process does while it imports."""

from __future__ import annotations

import subprocess
import sys

IMPORTS = """
import gc
from counterweight.workers.process import importing

def young() -> bool:
    return any(one is made for one in gc.get_objects(generation=0))

gc.disable()
made = [[]]
gc.freeze() if {frozen} else None
with importing():
    made = [[]]
print(young(), gc.get_freeze_count() > 0)
"""


def run(*, frozen: bool) -> str:
    command = [sys.executable, "-c", IMPORTS.format(frozen=frozen)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_collector_does_not_look_at_what_was_imported_as_young() -> None:
    assert run(frozen=False) == "False False"


def test_what_somebody_has_frozen_stays_frozen() -> None:
    assert run(frozen=True) == "True True"
