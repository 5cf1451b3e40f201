"""Requests that schemathesis makes from the OpenAPI document of the service: `make fuzz-api`. Fails where an answer is a 5xx,
or is not what the document says.

The service is a real process on a store in a folder, asked with an admin's token. Streams are left out: they end with a job.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOKEN = "of-the-fuzzing"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--st", required=True, help="schemathesis' command")
    parser.add_argument("--examples", type=int, default=30, help="of each operation")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        tokens.write_text(json.dumps([{"name": "fuzz", "role": "admin", "sha256": digest}]))
        options = ["--store", f"{folder}/store", "--allow", "file:/allowed", "--tokens", str(tokens), "--port", "0"]
        command = [sys.executable, "-m", "counterweight.pipeline.cli", "serve", *options, "--rate", "100000"]
        service = subprocess.Popen([*command, "--burst", "1000000"], stderr=subprocess.PIPE, text=True)
        assert service.stderr is not None
        try:
            url = next(found[0] for line in service.stderr if (found := re.search(r"http://127[0-9.:]+", line)))
            asked = [f"{url}/v1/openapi.json", "--header", f"Authorization: Bearer {TOKEN}", "--checks", CHECKS]
            bounds = [
                "--max-examples",
                str(arguments.examples),
                "--seed",
                str(arguments.seed),
                "--request-timeout",
                "60",
            ]
            fuzzed = [arguments.st, "run", *asked, *bounds, "--exclude-path-regex", "(events|logs)$"]
            return subprocess.run(fuzzed, check=False).returncode
        finally:
            service.terminate()
            service.communicate()


if __name__ == "__main__":
    sys.exit(main())
