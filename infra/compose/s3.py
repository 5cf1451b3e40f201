"""The S3 server of `compose.yaml`: the tests' Ceph gateway, with a user whose keys are in a file.

    python s3.py --directory /data --credentials /run/secrets/storage [--port 9000]

Runs until SIGTERM; the data stays. One copy on one disk, without encryption: for a laptop.
"""

from __future__ import annotations

import argparse
import configparser
import signal
import subprocess
import sys
from pathlib import Path

import ceph_rgw
from daemons import StartError, fail, run_tool

USER = "laptop"


def keys(path: Path) -> tuple[str, str]:
    """Access key and secret of the default profile of a file as AWS's tools read it. StartError where it has none."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text())
        profile = parser["default"]
        return profile["aws_access_key_id"], profile["aws_secret_access_key"]
    except (OSError, configparser.Error, KeyError) as error:
        raise StartError(
            f"{path}: {error}: expected [default] with aws_access_key_id and aws_secret_access_key"
        ) from error


def admit(directory: Path, access: str, secret: str) -> None:
    """Makes the user, or gives it these keys, and shuts out the tests' user, whose keys everybody knows."""
    admin = ["radosgw-admin", "-c", str(directory / "ceph.conf"), "user"]
    known = subprocess.run([*admin, "info", "--uid", USER], capture_output=True, check=False).returncode == 0
    change = ["modify"] if known else ["create", "--display-name", USER]
    # Not `run_tool`, whose errors name the whole command line.
    made = subprocess.run(
        [*admin, *change, "--uid", USER, "--access-key", access, "--secret", secret], capture_output=True, check=False
    )
    if made.returncode != 0:
        raise StartError(f"radosgw-admin user {change[0]}: exit {made.returncode}")
    run_tool([*admin, "suspend", "--uid", "test"])


def main() -> int:
    parser = argparse.ArgumentParser(description="An S3 server for a laptop.")
    parser.add_argument("--directory", type=Path, required=True, help="data, logs and process ids")
    parser.add_argument(
        "--credentials", type=Path, required=True, help="file with the user's keys, as AWS's tools read it"
    )
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on, at the first start")
    parser.add_argument("--port", type=int, default=9000, help="of the endpoint, at the first start")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        access, secret = keys(arguments.credentials)
        endpoint = ceph_rgw.start(directory, arguments.port, arguments.host)["endpoint"]
        admit(directory, access, secret)
        print(f"ready: {endpoint}", flush=True)
        while True:
            signal.pause()
    except StartError as error:
        return fail(error)
    finally:
        ceph_rgw.stop(directory)


if __name__ == "__main__":
    sys.exit(main())
