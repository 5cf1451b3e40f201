"""Small disks, which really are full: a tmpfs of its own size, where this process may mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system of `place`."""

    place: Path

    def resize(self, size: int) -> None:
        """To so many bytes, of which no fewer than are used."""
        _mount("-o", f"remount,size={size}", str(self.place))


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Disk]:
    """Makes the directory `place`, and on it a file system of `size` bytes; both are gone afterwards."""
    place.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


@cache
def can_mount() -> bool:
    """Whether the system lets this process do it."""
    with TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder) / "disk", 1 << 16):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
