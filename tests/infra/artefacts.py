"""What lies below infra/, read as values: YAML documents, containers, command lines, instructions of a Containerfile."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
COMPOSE = INFRA / "compose" / "compose.yaml"
RAY_UP = INFRA / "ray" / "cluster.yaml"
CONTAINERFILES = sorted(INFRA.glob("**/Containerfile*"))
YAML_FILES = sorted(INFRA.glob("**/*.yaml"))
PAGES = [
    INFRA / "README.md",
    INFRA / "compose" / "README.md",
    ROOT / "docs" / "operations.md",
    ROOT / "docs" / "jobs.md",
]

Document = dict[str, Any]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping says twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"{node.start_mark}: said twice: {', '.join(sorted(twice))}")
        return super().construct_mapping(node, deep)


def documents(path: Path) -> list[Document]:
    """The YAML documents of a file. yaml.YAMLError."""
    return list(yaml.load_all(path.read_text(), Loader=_UniqueKeys))


def manifests() -> list[Document]:
    """Every object of Kubernetes; kustomizations are none."""
    files = [path for path in sorted(KUBERNETES.glob("**/*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in files for document in documents(path)]


def of_kind(kind: str) -> Document:
    """The one object of a kind."""
    (found,) = [document for document in manifests() if document["kind"] == kind]
    return found


def mappings(value: object) -> Iterator[Document]:
    """Every mapping inside, the outer ones first."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from mappings(part)
    elif isinstance(value, list):
        for part in value:
            yield from mappings(part)


def pods() -> dict[str, Document]:
    """The specs of pods, by the name of their first container."""
    return {
        found["containers"][0]["name"]: found
        for document in manifests()
        for found in mappings(document)
        if "containers" in found
    }


def services() -> dict[str, Document]:
    """The services of the compose file."""
    found: dict[str, Document] = documents(COMPOSE)[0]["services"]
    return found


def commands() -> dict[str, list[str]]:
    """Every command line of ours, without `counterweight`, by where it stands."""
    found: dict[str, list[str]] = {}
    for name, service in services().items():
        if service["image"].startswith("counterweight:") and "command" in service:
            found[f"compose: {name}"] = service["command"]
        if (test := service.get("healthcheck", {}).get("test", []))[1:2] == ["counterweight"]:
            found[f"compose: health of {name}"] = test[2:]
    for name, pod in pods().items():
        (container,) = pod["containers"]
        if "args" in container:
            found[f"kubernetes: {name}"] = container["args"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                program, *arguments = container[probe]["exec"]["command"]
                assert program == "counterweight", f"{probe} of {name}"
                found[f"kubernetes: {probe} of {name}"] = arguments
    program, *arguments = shlex.split(of_kind("RayJob")["spec"]["entrypoint"])
    assert program == "counterweight"
    found["kubernetes: RayJob"] = arguments
    for path in (*PAGES, RAY_UP):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if (match := re.match(r"(?:#\s+)?(?:\w+=\S+ )*counterweight (.+)", line)) is not None:
                found[f"{path.name}:{number}"] = shlex.split(match[1], comments=True)
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Containerfile: name and the rest, lines that are continued joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined)]


def arguments_of(path: Path) -> Mapping[str, str]:
    """Build arguments and their defaults."""
    return dict(rest.split("=", 1) for name, rest in instructions(path) if name == "ARG" and "=" in rest)


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    (found,) = re.findall(rf"^{re.escape(name)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return str(found)
