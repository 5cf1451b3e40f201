"""The ecosystem's own checks of deployment files, where their tools are installed: none of them is a dependency of the suite.

infra/README.md says with which versions they were run, and what they said.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.infra.artefacts import COMPOSE, CONTAINERFILES, INFRA, KUBERNETES, RAY_UP, ROOT, documents

CRDS = ROOT.parent / "shared" / "data" / "kuberay-crds"
"""KubeRay's own definitions; a megabyte each, so no part of this repository."""


def tool(name: str, *arguments: object, cwd: Path = ROOT, **environment: str) -> str:
    """Runs a tool and gives back what it prints; skips the test where it is not installed."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [path, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    tool("hadolint", path)


def test_the_compose_file_is_one() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


@pytest.mark.parametrize("name", ["driver", "driver-gpu", "ray"])
def test_kustomize_renders_what_kubernetes_takes(name: str, tmp_path: Path) -> None:
    rendered = tool("kubectl", "kustomize", KUBERNETES / name)
    assert "image: counterweight\n" not in rendered, "without a tag"
    assert {"Namespace", "ConfigMap", "NetworkPolicy"} <= {one["kind"] for one in yaml.safe_load_all(rendered)}
    (tmp_path / "rendered.yaml").write_text(rendered)
    tool("kubernetes-validate", "--strict", tmp_path / "rendered.yaml")


def _strict(schema: Any) -> Any:
    """A schema of a CRD as the API server applies it: unknown fields are errors; some are numbers or texts."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(part) for name, part in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False) is True:
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if isinstance(made.get("properties"), dict) and "type" in made and "additionalProperties" not in made:
        made["additionalProperties"] = made.get("x-kubernetes-preserve-unknown-fields", False)
    return made


@pytest.fixture(scope="module", params=["raycluster", "rayjob"])
def kuberay(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """One of our objects and its schema."""
    path = CRDS / f"ray.io_{request.param}s.yaml"
    if not path.exists():
        pytest.skip("KubeRay's CRDs are not beside the repository (../shared/data/kuberay-crds)")
    (document,) = documents(KUBERNETES / "ray" / f"{request.param}.yaml")
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = [
        one["schema"]["openAPIV3Schema"] for one in versions if f"ray.io/{one['name']}" == document["apiVersion"]
    ]
    made = _strict(schema)
    made["properties"]["metadata"] = {"type": "object"}
    return document, made


def test_kuberay_takes_its_objects_and_no_others(kuberay: tuple[dict[str, Any], dict[str, Any]]) -> None:
    document, schema = kuberay
    validator = jsonschema.Draft7Validator(schema)
    assert not [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]
    wrong = {**document, "spec": {**document["spec"], "entrypont": "counterweight"}}
    assert list(validator.iter_errors(wrong))


def test_promtool_takes_rules_configuration_and_every_query_of_the_board(tmp_path: Path) -> None:
    folder = INFRA / "observability"
    tool("promtool", "check", "rules", folder / "rules.yml")
    tool("promtool", "check", "config", "--syntax-only", folder / "prometheus.yml")
    panels = json.loads((folder / "grafana.json").read_text())["panels"]
    asked = [target["expr"].replace("$__rate_interval", "5m") for panel in panels for target in panel["targets"]]
    rules = [{"record": f"board:{number}", "expr": query} for number, query in enumerate(asked)]
    (tmp_path / "board.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    assert f"{len(asked)} rules found" in tool("promtool", "check", "rules", tmp_path / "board.yml")


QUIET = {"CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": os.devnull}


def terraform(module: Path) -> str:
    """Validates a module and runs its tests; gives back what these say."""
    tool("terraform", "init", "-backend=false", cwd=module, **QUIET)
    tool("terraform", "validate", cwd=module, **QUIET)
    return tool("terraform", "test", "-no-color", cwd=module, **QUIET)


def test_terraform_is_formatted() -> None:
    tool("terraform", "fmt", "-check", "-recursive", INFRA / "terraform", **QUIET)


def test_the_policy_needs_no_provider(tmp_path: Path) -> None:
    module = shutil.copytree(INFRA / "terraform" / "policy", tmp_path / "policy")
    assert "5 passed, 0 failed" in terraform(module)


def test_the_bucket_is_what_its_tests_say(tmp_path: Path) -> None:
    if "TF_CLI_ARGS_init" not in os.environ:
        pytest.skip(
            "AWS's provider: set TF_CLI_ARGS_init=-plugin-dir=... to where it lies, or empty to let terraform fetch it"
        )
    module = shutil.copytree(INFRA / "terraform", tmp_path / "terraform")
    assert "2 passed, 0 failed" in terraform(module)


def test_ray_up_takes_its_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (cluster,) = documents(RAY_UP)
    validate_config(prepare_config(cluster))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**cluster, "max_worker": 1}))


def test_a_bill_of_materials_names_what_is_installed(tmp_path: Path) -> None:
    made = tmp_path / "sbom.json"
    tool("cyclonedx-py", "environment", "--output-reproducible", "--no-validate", "--output-file", made, sys.executable)
    names = {component["name"].lower() for component in json.loads(made.read_text())["components"]}
    assert {"torch", "ray", "boto3", "transformers"} <= names
