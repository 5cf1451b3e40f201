"""The last net: whatever nobody foresaw is one line, exit code 70 and a file without secrets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from counterweight.pipeline.crash import report_crash, without_secrets

# A defect is made by a module of ours that fails when it is asked, in a process that is then the command.
DEFECT = """
import sys
from counterweight.pipeline import manifest

class Panic(BaseException):
    pass

def broken(*_):
    {body}

manifest.load_manifest = broken
from counterweight.pipeline.cli import main
sys.exit(main(sys.argv[1:]))
"""
BODIES = {
    "an exception": "raise RuntimeError('two\\nlines with hunter2secret')",
    "a panic": "raise Panic('panicked')",
    "an endless recursion": "broken()",
    "out of memory": "raise MemoryError",
}


def run(body: str, state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = DEFECT.format(body=body)
    arguments = ["plan", "s3://user:pass@bucket/job.yaml?sig=abc", "--set", "api_key=tiptop"]
    env = {**os.environ, "XDG_STATE_HOME": str(state), **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.parametrize("case", BODIES)
def test_what_nobody_foresaw_is_one_line_and_a_file(tmp_path: Path, case: str) -> None:
    ran = run(BODIES[case], tmp_path, AWS_SECRET_ACCESS_KEY="hunter2secret")
    assert ran.returncode == 70
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    found = re.fullmatch(r"error: a defect of counterweight [(].*[)]: details are in (\S+)", line)
    assert found is not None
    path = Path(found[1])
    assert path.parent == tmp_path / "counterweight"
    text = path.read_text()
    assert "Traceback" in text
    assert "torch " in text
    assert len(text) < 60_000
    for secret in ("hunter2secret", "pass@", "sig=abc", "tiptop"):
        assert secret not in text + line
    assert path.stat().st_mode & 0o077 == 0


def test_where_no_file_can_be_written_the_line_says_so(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    code = f"import tempfile; tempfile.tempdir = {str(blocked)!r}\n"
    env = {**os.environ, "XDG_STATE_HOME": str(blocked)}
    ran = subprocess.run(
        [sys.executable, "-c", code + DEFECT.format(body="raise KeyError(1)"), "plan", "x"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert ran.returncode == 70
    assert ran.stderr == "error: a defect of counterweight (KeyError: 1): no crash file could be written\n"


def test_secrets_are_values_of_variables_that_speak_of_them() -> None:
    environment = {"GITHUB_TOKEN": "abcdefgh", "PATH": "/usr/bin", "A_KEY": "ab"}
    assert without_secrets("/usr/bin abcdefgh ab", environment) == "/usr/bin *** ab"
    assert without_secrets("at https://me:word@host/a?x=1 b", {}) == "at https://***@host/a?*** b"


def test_the_folder_for_temporary_files_is_the_other_place(tmp_path: Path) -> None:
    line = report_crash(ValueError("x"), ["run"])
    path = Path(line.rsplit(" ", 1)[1])
    assert "ValueError: x" in path.read_text()
    path.unlink()
