"""A real S3 server for tests: one Ceph monitor, one OSD on a file, one RADOS gateway, all on the loopback
interface.

python infra/s3/ceph_rgw.py start --directory /tmp/ceph # prints endpoint and keys as JSON python
infra/s3/ceph_rgw.py stop --directory /tmp/ceph

Both are idempotent, and a second start continues on the same data, after a crash too. Needs no rights
beyond the user's. The data is unreplicated and unauthenticated inside: for tests only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from pathlib import Path

from daemons import (
    StartError,
    fail,
    free_ports,
    http_status,
    run_tool,
    start_daemon,
    stop_daemons,
    succeeds,
    wait_for,
)

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
ACCESS_KEY, SECRET_KEY, REGION = "TESTACCESSKEY", "testsecretkey", "us-east-1"

_GIB = 1 << 30
START_SECONDS = 300.0
"""That a daemon may take on a loaded machine; on an idle one it takes two."""


def configuration(directory: Path, fsid: str, monitor_port: int, port: int, host: str) -> str:
    """The text of ceph.conf for one of everything. host: where the gateway listens; the rest is on loopback."""
    options = {
        "fsid": fsid,
        # Nothing inside is reachable from outside the machine, and keys would only slow the start.
        "auth cluster required": "none",
        "auth service required": "none",
        "auth client required": "none",
        "mon host": f"[v1:127.0.0.1:{monitor_port}]",
        "public addr": "127.0.0.1",
        "cluster addr": "127.0.0.1",
        "ms bind msgr2": "false",
        # One OSD: a pool must be content with one copy, placed on a device where Ceph would ask for hosts.
        "mon allow pool size one": "true",
        "osd pool default size": "1",
        "osd pool default min size": "1",
        "osd pool default pg num": "8",
        "osd pool default pgp num": "8",
        "osd crush chooseleaf type": "0",
        # The monitor gathers changes for a second before it agrees on them; making pools is a dozen in a row.
        "paxos propose interval": "0.05",
        "paxos min wait": "0.01",
        # Otherwise the OSD places itself when it starts, and gives up where it asks the monitor before it has
        # the monitor's map ("wrong fsid", one start in five).
        "osd crush update on start": "false",
        "osd class update on start": "false",
        "osd memory target": str(_GIB),
        "bluestore block size": str(10 * _GIB),  # of a sparse file
        "mon data avail crit": "1",
        "mon data": str(directory / "mon"),
        "osd data": str(directory / "osd"),
        "rgw data": str(directory / "rgw"),
        "keyring": str(directory / "keyring"),
        "run dir": str(directory / "run"),
        # None: a socket's path may have 107 bytes, less than many a test's directory.
        "admin socket": "",
        "log file": f"{directory}/log/$name.log",
        # Nothing here expires, and the thread would delay the stop by ten seconds.
        "rgw enable lc threads": "false",
        "rgw frontends": f"beast endpoint={host}:{port}",
    }
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in options.items())


def start(directory: Path, port: int | None, host: str = "127.0.0.1") -> dict[str, str]:
    """Starts what does not run yet, and waits until the gateway answers; returns what a client needs. port, host: of the S3
    endpoint, at the first start."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise StartError(f"not installed: {', '.join(missing)} (Debian: ceph-mon ceph-osd radosgw ceph-common)")
    state = directory / "state.json"
    if state.exists():
        ports = json.loads(state.read_text())
    else:
        monitor_port, rgw_port = free_ports(2)
        ports = {"monitor": monitor_port, "rgw": port or rgw_port}
        _prepare(directory, ports, host)
    conf = directory / "ceph.conf"
    ceph: list[str | Path] = ["ceph", "-c", conf, "--connect-timeout", "10"]
    start_daemon(directory, "mon", ["ceph-mon", "-f", "-c", conf, "-i", "a"], {})
    # It accepts connections before it is in a quorum, and refuses commands until then.
    wait_for(directory, "mon", lambda: succeeds([*ceph, "mon", "stat"]), START_SECONDS)
    if not (directory / "osd" / "ready").exists():
        identity = str(uuid.uuid4())
        # On a loaded machine the monitor was seen to answer one command and refuse the next ("EPERM: problem getting command
        # descriptions"). Both may be given twice.
        for command in (["new", identity, "0"], ["crush", "add", "osd.0", "1", "root=default", "host=one"]):
            wait_for(directory, "mon", lambda command=command: succeeds([*ceph, "osd", *command]), START_SECONDS)
        run_tool(["ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", identity])
    start_daemon(directory, "osd", ["ceph-osd", "-f", "-c", conf, "-i", "0"], {})
    gateway: list[str | Path] = [
        "radosgw",
        "-f",
        "-c",
        conf,
        "-n",
        "client.admin",
        "--log-file",
        directory / "log" / "rgw.log",
    ]
    start_daemon(directory, "rgw", gateway, {})
    wait_for(directory, "rgw", lambda: http_status(ports["rgw"], "/") == 200, START_SECONDS)
    if not state.exists():
        user = ["--uid", "test", "--display-name", "test", "--access-key", ACCESS_KEY, "--secret", SECRET_KEY]
        run_tool(["radosgw-admin", "-c", conf, "user", "create", *user])
        state.write_text(json.dumps(ports))  # last: a start that broke off before is started afresh
    return {
        "endpoint": f"http://127.0.0.1:{ports['rgw']}",
        "access_key": ACCESS_KEY,
        "secret_key": SECRET_KEY,
        "region": REGION,
    }


def stop(directory: Path) -> None:
    """Stops the daemons; the data stays."""
    stop_daemons(directory)


def _prepare(directory: Path, ports: dict[str, int], host: str) -> None:
    stop_daemons(directory)
    for name in ("mon", "osd", "rgw", "run", "log"):
        if (directory / name).exists():
            shutil.rmtree(directory / name)
        (directory / name).mkdir(parents=True)
    fsid = str(uuid.uuid4())
    (directory / "ceph.conf").write_text(configuration(directory, fsid, ports["monitor"], ports["rgw"], host))
    (directory / "keyring").write_text("")
    monmap = directory / "monmap"
    address = f"[v1:127.0.0.1:{ports['monitor']}]"
    run_tool(["monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap])
    run_tool(["ceph-mon", "-c", directory / "ceph.conf", "-i", "a", "--mkfs", "--monmap", monmap])


def main() -> int:
    parser = argparse.ArgumentParser(description="A one-node Ceph RADOS gateway on the loopback interface, for tests.")
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--directory", type=Path, required=True, help="data, logs and process ids")
    parser.add_argument("--port", type=int, help="of the S3 endpoint, at the first start (default: a free one)")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    try:
        if arguments.action == "stop":
            stop(directory)
        else:
            print(json.dumps(start(directory, arguments.port)))
    except StartError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
