"""What runs the fenced blocks of a document: Python, shell and manifests, in a folder with what they name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from counterweight.pipeline.cli import main
from counterweight.pipeline.manifest import load_submission
from tests.patience import PATIENCE

Print = Callable[[], tuple[str, str]]
"""What was printed on stdout and on stderr since it was asked last."""

STAYS = {"work": (), "serve": ("--port", "0")}
"""Commands that end when somebody ends them, and what lets several of them run on a machine."""

READY = re.compile(r"drives the jobs|http://127")
"""What these say when they have begun."""


class Blocks:
    """Parses and runs the blocks of one document. place: the working directory. printed: of this process."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch, printed: Print) -> None:
        self._place, self._patch, self._printed = place, patch, printed
        self._id = ""
        languages = {"python": self.python, "sh": self.shell, "yaml": self.manifest, "text": self.text}
        parsers = [CodeBlockParser(language, run) for language, run in languages.items()]
        self.sybil = Sybil(parsers=[*parsers, SkipParser()])

    def python(self, example: Example) -> None:
        """As it stands; the blocks of a document share their names."""
        exec(compile(str(example.parsed), f"{example.path}:{example.line}", "exec"), example.namespace)

    def text(self, example: Example) -> None:
        """What a program says, a tree of files, a drawing: nothing that anybody could type."""
        commands = re.findall(r"^\$? ?(?:counterweight|python|pip|make) .*", str(example.parsed), re.MULTILINE)
        assert commands == [], "commands belong into a block of sh"

    def manifest(self, example: Example) -> None:
        """Planned, where it is a job; read with the manifests that it names, where it is a batch."""
        text = str(example.parsed)
        document = yaml.safe_load(text)
        path = self._place / f"line-{example.line}.yaml"
        path.write_text(text)
        if document["kind"] == "CompressionBatch":
            assert load_submission(str(path), [], None).jobs
            return
        tiny = ["--set", f"spec.model.uri={self._place / 'model'}", "--set", f"spec.output.uri={self._place / 'out'}"]
        self._run(["plan", str(path), "--json", *tiny])

    def shell(self, example: Example) -> None:
        """Line by line: our commands in this process, others by bash; ID is what the last `submit` printed."""
        for line in str(example.parsed).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["export"]:
                for assignment in words[1:]:
                    name, _, value = assignment.partition("=")
                    self._patch.setenv(name, os.path.expandvars(value))
            elif words[:1] == ["counterweight"]:
                self._counterweight([self._id if word == "ID" else word for word in words[1:]])
            elif words:
                subprocess.run(["bash", "-euc", line], cwd=self._place, check=True, timeout=PATIENCE)

    def _counterweight(self, words: list[str]) -> None:
        if words[0] in STAYS and not {"--until", "--idle"}.intersection(words):
            _stays([*words, *STAYS[words[0]]], self._place)
            return
        said = self._run(words)
        if words[0] == "submit":
            self._id = said.splitlines()[-1]

    def _run(self, words: list[str]) -> str:
        code = main(words)
        out, err = self._printed()
        assert code == 0, f"counterweight {shlex.join(words)}: exit {code}\n{err}"
        return out


def _stays(words: list[str], place: Path) -> None:
    """Starts a command, waits until it has begun, and ends it."""
    command = [sys.executable, "-m", "counterweight.pipeline.cli", *words]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if READY.search(line):
                break
        process.terminate()
        assert process.wait(PATIENCE) in (0, 143), "".join(said)
    assert READY.search(said[-1]), "".join(said)
