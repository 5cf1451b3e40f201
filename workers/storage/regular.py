"""Regular files below a directory: no link leads out of it, no pipe or device is waited for.

Model folders and artifacts come from others. A link in one could name any file of this host, which would then be published;
opening a named pipe waits for ever, and a device may have no end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from counterweight.workers.errors import RequestError

_NO_FILE = (errno.ENXIO, errno.ENODEV)
"""What opening a socket, or a device without a driver, ends in."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def confined(root: Path, path: Path, *, follow: bool = True) -> Path:
    """The real path of `path`, which lies below `root`; RequestError when a link leads out of `root`.

    follow: a link that `path` itself is counts; without, only those among its directories. What `root` itself is reached
    through is the user's affair. A snapshot in Hugging Face's cache (`models--owner--name/snapshots/<revision>`) consists of
    links into `blobs` beside `snapshots`, which belongs to it.
    """
    home = Path(os.path.realpath(root))
    real = Path(os.path.realpath(path) if follow else os.path.join(os.path.realpath(path.parent), path.name))
    places = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in places):
        raise RequestError(
            f"{path.as_uri()}: a link out of {root.as_uri()}, to {real}: expected a file of that folder itself"
        )
    return real


def open_regular(path: Path) -> int:
    """A descriptor of the regular file at the real path `path`, for reading; OSError as `os.open`, RequestError, at once, for
    anything that is neither a file nor a directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _special(path, "a socket or a device") from error
        raise
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: Path, mode: int) -> None:
    """IsADirectoryError for a directory, RequestError for what is no file either."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise _special(path, _KINDS.get(stat.S_IFMT(mode), "no file"))


def _special(path: Path, kind: str) -> RequestError:
    return RequestError(f"read {path.as_uri()}: {kind}: expected a regular file")
