"""Files built to exhaust memory or time: each is refused within two seconds and 200 MB.

The bombs are opened in a process of their own. Its peak is taken from /proc, where it can be set back before
each bomb (getrusage's would begin at the peak of the process that started it); its time is the processor's,
which other work on the machine does not stretch.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from counterweight.workers.checkpoint.header import MAX_HEADER_BYTES
from tests.patience import MAX_CPU, TRIES
from tests.workers.checkpoint.builders import INDEX, write_checkpoint

MAX_GROWTH = 200_000_000  # bytes of resident memory beyond those before the bomb

# Opens each URI that comes on a line; answers with a line: what came of it, seconds, growth of memory.
OPENER = """
import json, sys, time
from counterweight.workers.checkpoint import Checkpoint
from counterweight.workers.errors import CheckpointError
from counterweight.workers.storage import open_store

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

for line in sys.stdin:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the peak back to what is held now
    before, begin = memory("VmRSS"), time.process_time()
    try:
        outcome = f"accepted: {len(Checkpoint.open(open_store(line.strip())).names)} tensors"
    except CheckpointError as refused:
        outcome = str(refused)
    print(json.dumps([outcome, time.process_time() - begin, memory("VmHWM") - before]), flush=True)
"""


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def written(name: str, make: Callable[[], bytes], size: int | None = None) -> Callable[[Path], None]:
    """A checkpoint with one more file, extended by zeros to `size` (which costs no disk)."""

    def write(root: Path) -> None:
        (root / name).write_bytes(make())
        if size is not None:
            with (root / name).open("r+b") as file:
                file.truncate(size)

    return write


def filled(begin: bytes, filler: bytes, end: bytes) -> Callable[[Path], None]:
    """A checkpoint whose header is as long as the limit allows."""
    count = (MAX_HEADER_BYTES - len(begin) - len(end)) // len(filler)
    return written("model.safetensors", lambda: framed(begin + filler * count + end))


def sixty_thousand() -> bytes:
    """As many tensors with long names, and then the header breaks off."""
    entry = b'"%0480d":{"dtype":"U8","shape":[0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,0]}'
    return framed(b"{" + b",".join(entry % number for number in range(60_000)) + b",")


WIDE = "\U0001f600".encode()  # one such character makes Python hold a text in four bytes each
PAIRS = b",".join(b'"%04d":""' % number for number in range(9999)) + b","
ZEROS = b",".join(b'"%d":0' % number for number in range(90_000))
LENGTH = (101_000_000).to_bytes(8, "little")

BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "101 MB": (
        written("model.safetensors", lambda: LENGTH, 101_000_008),
        "header of 101000000 bytes, expected at",
    ),
    "nested lists": (filled(b'{"a":', b"[", b"}"), "expected an object"),
    "nested objects": (filled(b"", b'{"a":', b"1"), "for tensor 'a'"),
    "empty lists": (filled(b'{"a":{"shape":[', b"[],", b"[]]}}"), "expected an object"),
    "one number": (filled(b'{"a":{"shape":[', b"9", b"]}}"), "expected an object"),
    "one name": (filled(b'{"', b"n", b'":{}}'), "a string of 999999"),
    "one name of wide characters": (filled(b'{"', WIDE, b'":{}}'), "a string of 999999"),
    "one name of escapes": (filled(b'{"', b"\\n", b'":{}}'), "a string of 999999"),
    "an unclosed name": (filled(b'{"', b"\\n", b""), "expected a name in quotes"),
    "spaces": (filled(b'{"a"', b" ", b""), "expected a name in quotes"),
    "metadata of one text": (filled(b'{"__metadata__":{"a":"', b"x", b'"}}'), "a string of 999999"),
    "metadata of many keys": (filled(b'{"__metadata__":{', PAIRS, b'"a":""}}'), "occurs twice"),
    "many tensors": (written("model.safetensors", sixty_thousand), "the end, expected a name"),
    "index of 200 MB": (written(INDEX, lambda: b"{}", 200_000_000), "200000000 bytes, expected at most"),
    "index of lists": (
        written(INDEX, lambda: b'{"a":[' + b"[]," * 11_000_000 + b"[]]}"),
        "JSON values, expected",
    ),
    "index of a wide text": (
        written(INDEX, lambda: b'{"a":"' + WIDE * 8_000_000 + b'"}'),
        "weight_map: None",
    ),
    "config of 50 MB": (
        written("config.json", lambda: b"{}", 50_000_000),
        "50000000 bytes, expected at most",
    ),
    "config with a long key above many": (
        written("config.json", lambda: b'{"' + b"k" * 3_000_000 + b'":{' + ZEROS + b"}}"),
        "neither model.safetensors nor",
    ),
}


@pytest.fixture(scope="module")
def opener() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OPENER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()  # ends its loop


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_in_bounded_time_and_memory(opener: subprocess.Popen[str], tmp_path: Path, case: str) -> None:
    arm, problem = BOMBS[case]
    root = tmp_path / "bomb"
    write_checkpoint(root, {})
    arm(root)
    assert opener.stdin is not None
    assert opener.stdout is not None
    for _ in range(TRIES):  # others share the processor's caches and cores
        print(root.as_uri(), file=opener.stdin, flush=True)
        outcome, seconds, growth = json.loads(opener.stdout.readline())
        if seconds < MAX_CPU:
            break
    shutil.rmtree(root)  # a gigabyte in all
    assert outcome.startswith(root.as_uri())
    assert problem in outcome
    assert len(outcome) < 1000
    assert seconds < MAX_CPU
    assert growth < MAX_GROWTH
