"""A real S3 server that is not atomic, for tests: OpenStack Swift with its S3 interface, on the loopback
interface.

python infra/s3/swift.py start --directory /tmp/swift --python /path/to/venv/bin/python # prints JSON python
infra/s3/swift.py stop --directory /tmp/swift

Swift looks whether an object exists and writes it afterwards, so `PUT If-None-Match: *` lets several
concurrent writers win; Counterweight's probe must refuse it. `--python` is the interpreter of a virtual
environment in which `pip install swift` was run (it needs the Debian package liberasurecode1). One replica:
for tests only.
"""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from daemons import StartError, fail, free_ports, http_status, run_tool, start_daemon, stop_daemons, wait_for

RINGS = ("account", "container", "object")
ACCOUNT, USER, PASSWORD, REGION = "test", "tester", "testing", "us-east-1"

# Swift's own order: S3 requests are translated and authenticated before the large-object filters see them.
PIPELINE = (
    "catch_errors",
    "gatekeeper",
    "healthcheck",
    "listing_formats",
    "s3api",
    "tempauth",
    "copy",
    "slo",
    "dlo",
)
FILTER_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "s3api": {"location": REGION},
    "tempauth": {f"user_{ACCOUNT}_{USER}": f"{PASSWORD} .admin"},
    "slo": {
        "max_manifest_segments": "10000",
        "max_manifest_size": "8388608",
    },  # what a multipart upload becomes
}


def start(directory: Path, python: Path, port: int | None) -> dict[str, str]:
    """Starts what does not run yet, and waits until the proxy answers; returns what a client needs."""
    programs = python.parent
    if not (programs / "swift-proxy-server").exists():
        raise StartError(f"Swift is not installed beside {python} (pip install swift)")
    state = directory / "state.json"
    if state.exists():
        ports = json.loads(state.read_text())
    else:
        names = ("proxy", *RINGS)
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        if port is not None:
            ports["proxy"] = port
        _prepare(directory, programs, ports)
        state.write_text(json.dumps(ports))
    for name in (*RINGS, "proxy"):
        server = [python, programs / f"swift-{name}-server", directory / "etc" / f"{name}-server.conf"]
        start_daemon(directory, name, server, {})
    wait_for(directory, "proxy", lambda: http_status(ports["proxy"], "/healthcheck") == 200, 30)
    return {
        "endpoint": f"http://127.0.0.1:{ports['proxy']}",
        "access_key": f"{ACCOUNT}:{USER}",
        "secret_key": PASSWORD,
        "region": REGION,
    }


def _prepare(directory: Path, programs: Path, ports: Mapping[str, int]) -> None:
    etc = directory / "etc"
    etc.mkdir(parents=True, exist_ok=True)
    (directory / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    common = {
        "bind_ip": "127.0.0.1",
        "user": getpass.getuser(),
        "swift_dir": str(etc),
        "devices": str(directory / "devices"),
        "mount_check": "false",  # the device is a directory
        "workers": "0",  # serve in the process itself, or a stop would leave children
        "disable_fallocate": "true",
        "log_level": "WARNING",
    }
    policy = {"name": "Policy-0", "default": "yes"}
    secrets = {"swift_hash_path_prefix": "prefix", "swift_hash_path_suffix": "suffix"}
    _write_sections(etc / "swift.conf", {"swift-hash": secrets, "storage-policy:0": policy})
    for name in RINGS:
        sections = {
            "DEFAULT": {**common, "bind_port": str(ports[name])},
            "pipeline:main": {"pipeline": f"{name}-server"},
            f"app:{name}-server": {"use": f"egg:swift#{name}"},
        }
        _write_sections(etc / f"{name}-server.conf", sections)
        builder = etc / f"{name}.builder"
        ring = programs / "swift-ring-builder"
        builder.unlink(missing_ok=True)
        run_tool([ring, builder, "create", "6", "1", "0"])  # 2^6 partitions, 1 replica, movable at once
        run_tool([ring, builder, "add", f"r1z1-127.0.0.1:{ports[name]}/disk", "1"])
        run_tool([ring, builder, "rebalance"])
    proxy: dict[str, Mapping[str, str]] = {
        "DEFAULT": {**common, "bind_port": str(ports["proxy"])},
        "pipeline:main": {"pipeline": " ".join((*PIPELINE, "proxy-server"))},
        "app:proxy-server": {"use": "egg:swift#proxy", "account_autocreate": "true"},
    }
    for name in PIPELINE:
        proxy[f"filter:{name}"] = {"use": f"egg:swift#{name}", **FILTER_OPTIONS.get(name, {})}
    _write_sections(etc / "proxy-server.conf", proxy)


def _write_sections(path: Path, sections: Mapping[str, Mapping[str, str]]) -> None:
    lines: list[str] = []
    for title, options in sections.items():
        lines += [f"[{title}]", *(f"{name} = {value}" for name, value in options.items()), ""]
    path.write_text("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description="OpenStack Swift with its S3 interface, for tests.")
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--directory", type=Path, required=True, help="data, logs and process ids")
    parser.add_argument("--python", type=Path, help="interpreter of an environment with Swift (to start)")
    parser.add_argument("--port", type=int, help="of the S3 endpoint, at the first start (default: a free one)")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    if arguments.action == "stop":
        stop_daemons(directory)
        return 0
    if arguments.python is None:
        parser.error("start needs --python")
    try:
        # Made absolute, not resolved: in a virtual environment the interpreter is a link out of it.
        print(json.dumps(start(directory, arguments.python.absolute(), arguments.port)))
    except StartError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
