"""Runs the shell blocks of the tutorial, one after the other, as a reader would: `python -m tests.docs.tutorial`.

In one shell at the root of the checkout, which stops at the first command that fails. What it makes lies in `tutorial/`, which
must not be there before.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"


def script() -> str:
    """All blocks of the page that are left to this."""
    block = r"^<!-- skip: next \"run by python -m tests\.docs\.tutorial\" -->\n\n```sh\n(.*?)^```$"
    return "\n".join(re.findall(block, PAGE.read_text(), re.MULTILINE | re.DOTALL))


def main() -> int:
    if (ROOT / "tutorial").exists():
        print(f"{ROOT / 'tutorial'}: is there already: expected nothing", file=sys.stderr)
        return 2
    # `kill %1` of the last block is job control, which a shell has to be asked for.
    command = ["bash", "-o", "errexit", "-o", "pipefail", "-o", "monitor", "-x", "-c", script()]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
