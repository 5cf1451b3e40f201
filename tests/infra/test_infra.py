"""What is true of deployment files without any tool: they are safe as written, and say nothing that our code does not know."""

from __future__ import annotations

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from packaging.specifiers import SpecifierSet

from counterweight.pipeline.cli import USAGE_ERROR, app
from counterweight.pipeline.jobs.attempt import GRACE_SECONDS
from counterweight.pipeline.manifest import load_manifest
from tests.infra.artefacts import (
    CONTAINERFILES,
    INFRA,
    KUBERNETES,
    PAGES,
    RAY_UP,
    ROOT,
    YAML_FILES,
    arguments_of,
    commands,
    documents,
    instructions,
    manifests,
    mappings,
    of_kind,
    pinned,
    pods,
    services,
)

IMAGE = INFRA / "image" / "Containerfile"
USER = 10001

EXTERNAL = {
    "AWS_ACCESS_KEY_ID": "boto3",
    "AWS_SECRET_ACCESS_KEY": "boto3",
    "AWS_DEFAULT_REGION": "boto3",
    "AWS_ENDPOINT_URL_S3": "boto3",
    "AWS_SHARED_CREDENTIALS_FILE": "boto3",
    "HF_TOKEN": "huggingface_hub",
    "PATH": "the system",
    "PYTHONUNBUFFERED": "Python",
    "RAY_AUTH_MODE": "Ray",
    "RAY_USAGE_STATS_ENABLED": "Ray",
}
"""Environment variables that others read."""


def parse(arguments: list[str]) -> None:
    """As the command line parses them, without doing anything. A usage error where it does not."""
    name, *rest = arguments
    group = typer.main.get_command(app)
    with group.make_context("counterweight", [name]) as context:
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        if command is None:
            raise typer.BadParameter(f"no command {name}")
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_yaml_parses_and_says_nothing_twice(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


@pytest.mark.parametrize("place", commands())
def test_command_lines_are_ours(place: str) -> None:
    parse(commands()[place])


@pytest.mark.parametrize("wrong", ["work --stoer s3://b", "serves", "run", "limits --concurrency many"])
def test_command_lines_that_are_not_ours_are_found(wrong: str) -> None:
    with pytest.raises(USAGE_ERROR):
        parse(shlex.split(wrong))


def test_the_rayjob_sets_fields_that_its_manifest_has() -> None:
    words = commands()["kubernetes: RayJob"]
    overrides = [value for option, value in pairwise(words) if option == "--set"]
    job = load_manifest(str(ROOT / "manifests" / Path(words[1]).name), overrides).job
    group = of_kind("RayCluster")["spec"]["workerGroupSpecs"][0]
    assert job.spec.resources.workers <= group["maxReplicas"]
    assert job.spec.resources.gpus_per_worker == float(_limits(group)["nvidia.com/gpu"])


def _limits(group: dict[str, object]) -> dict[str, str]:
    (limits,) = [found["limits"] for found in mappings(group) if "limits" in found]
    return dict(limits)


def _variables() -> set[str]:
    """Names of environment variables that the files set, or ask for."""
    found = {name for service in services().values() for name in service.get("environment", {})}
    for document in manifests():
        if document["kind"] == "ConfigMap":
            found |= document["data"].keys()
        found |= {one["name"] for part in mappings(document) for one in part.get("env", [])}
    for path in CONTAINERFILES:
        for name, rest in instructions(path):
            found |= {word.split("=")[0] for word in rest.split()} if name == "ENV" else set()
    texts = [path.read_text() for path in (*PAGES, *YAML_FILES)]
    found |= {
        name for text in texts for name in re.findall(r"\b(?:COUNTERWEIGHT|AWS|HF|RAY)_[A-Z0-9_]*[A-Z0-9]\b", text)
    }
    return found - {"RAY_HEAD_IP"}  # which Ray sets


def test_environment_variables_are_read_by_somebody() -> None:
    sources = "".join(path.read_text() for part in ("pipeline", "workers") for path in (ROOT / part).rglob("*.py"))
    unread = {name for name in _variables() - EXTERNAL.keys() if f'"{name}"' not in sources}
    assert not unread
    assert {"COUNTERWEIGHT_STORE", "COUNTERWEIGHT_START_SECONDS"} <= _variables()


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.name)
def test_an_image_is_pinned_and_runs_as_nobody_special(path: Path) -> None:
    defaults = arguments_of(path)
    stages = {rest.split(" AS ")[1] for name, rest in instructions(path) if name == "FROM" and " AS " in rest}
    for base in [rest.split()[0] for name, rest in instructions(path) if name == "FROM"]:
        for name, value in reversed(defaults.items()):
            base = base.replace(f"${{{name}}}", value)
        assert base in stages or re.fullmatch(r"docker\.io/library/[a-z]+:(?!latest)[a-z0-9.-]+", base), base
    users = [rest for name, rest in instructions(path) if name == "USER"]
    assert users[-1] == f"{USER}:{USER}"


def test_the_image_has_a_python_and_versions_that_the_package_knows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = arguments_of(IMAGE)["PYTHON"]
    assert python in SpecifierSet(project["requires-python"])
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    (install,) = [rest for name, rest in instructions(IMAGE) if name == "RUN" and "'ray[default]'" in rest]
    assert "--constraint constraints.txt" in install
    assert of_kind("RayCluster")["spec"]["rayVersion"] == pinned("ray")
    extra = re.findall(r"^([\w.-]+)==", (INFRA / "image" / "constraints.txt").read_text(), re.M)
    assert extra
    assert not set(extra) & set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))


def test_what_the_image_copies_is_let_through_and_nothing_else() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert "**" in (ROOT / ".dockerignore").read_text().splitlines()
    links = [path.readlink().name for path in (ROOT / "counterweight").iterdir() if path.is_symlink()]
    copied = [
        word for path in CONTAINERFILES for name, rest in instructions(path) if name == "COPY" for word in rest.split()
    ]
    named = [word for word in copied if word.startswith("infra/")]
    for needed in ["counterweight", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", *links, *named]:
        assert any(Path(needed).match(pattern) for pattern in kept), needed


def test_every_image_has_a_version() -> None:
    tagged = [service["image"] for service in services().values()]
    tagged.append(documents(RAY_UP)[0]["docker"]["image"])
    named = {container["image"] for pod in pods().values() for container in pod["containers"]}
    for path in KUBERNETES.glob("*/kustomization.yaml"):
        for image in documents(path)[0].get("images", []):
            named.discard(image["name"])
            tagged.append(f"{image['name']}:{image['newTag']}")
    assert not named, "no kustomization gives it a tag"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert all(
        re.fullmatch(rf"(?:registry\.example/)?counterweight(?:-s3)?:{re.escape(version)}(?:-cpu|-cuda)?", tag)
        for tag in tagged
    )


@pytest.mark.parametrize("name", pods())
def test_a_pod_has_no_rights_and_has_bounds(name: str) -> None:
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("hostPath" not in volume for volume in pod.get("volumes", []))
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


def test_a_service_of_compose_has_no_rights_and_has_bounds() -> None:
    for service in services().values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "mem_limit" in service
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert {name for name, service in services().items() if "healthcheck" in service} == {"s3", "driver"}


def test_drivers_stand_by_for_each_other_and_are_given_time_to_end() -> None:
    deployment, budget = of_kind("Deployment")["spec"], of_kind("PodDisruptionBudget")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    assert 1 <= budget["minAvailable"] < deployment["replicas"]
    assert deployment["selector"]["matchLabels"].items() <= labels
    assert budget["selector"]["matchLabels"].items() <= labels
    assert deployment["template"]["spec"]["terminationGracePeriodSeconds"] > GRACE_SECONDS
    assert float(services()["driver"]["stop_grace_period"].removesuffix("s")) > GRACE_SECONDS
    # One that waits for its store must not be killed for it.
    assert all("livenessProbe" not in container for pod in pods().values() for container in pod["containers"])


def test_every_pod_is_behind_a_network_policy() -> None:
    policies = [document["spec"] for document in manifests() if document["kind"] == "NetworkPolicy"]
    selectors = [policy["podSelector"]["matchLabels"] for policy in policies]
    assert of_kind("Deployment")["spec"]["template"]["metadata"]["labels"] in selectors
    assert {"ray.io/cluster": of_kind("RayCluster")["metadata"]["name"]} in selectors
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies)


def test_ray_asks_for_its_token_wherever_it_listens() -> None:
    assert of_kind("RayCluster")["spec"]["authOptions"] == {"mode": "token"}
    assert of_kind("RayJob")["spec"]["clusterSelector"] == {"ray.io/cluster": of_kind("RayCluster")["metadata"]["name"]}
    cluster = documents(RAY_UP)[0]
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)


def test_schedules_are_the_drivers_and_secrets_are_nowhere() -> None:
    assert not {document["kind"] for document in manifests()} & {"CronJob", "Secret"}
    secret = re.compile(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{20}"
        r"|(?i:secret_access_key|password|token)[\"']?\s*[=:]\s*[\"']?(?!\$|%|token\b)[A-Za-z0-9/+]{8,}"
    )
    files = [path for path in INFRA.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert not [(path.name, found[0]) for path in files if (found := secret.search(path.read_text()))]
    assert secret.search("aws_secret_access_key = wJalrXUtnFEMI")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_pages_name_exists(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]
    named = re.findall(r"`((?:tests|infra|docs|workers|pipeline)/[\w./-]+)`", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]
