"""The wheel, as a user installs it: beside Hugging Face's `kernels`, which transformers imports, and away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.servers import absent

ROOT = Path(__file__).parent.parent.parent
HUB_KERNELS = "kernels==0.17.2"
"""Hugging Face's package, whose top-level name our folder `kernels` shares."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools builds in the tree, and takes what an earlier build left there for sources. Compiled files come and go
    # while other tests run.
    sources = shutil.copytree(
        ROOT, place / "sources", symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "__pycache__")
    )
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(place), str(sources))
    (built,) = place.glob("counterweight-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel and `kernels`; what both depend on is borrowed from this
    one, less the checkout, which is installed here as editable: a path that a .pth file adds has its own .pth files ignored."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    interpreter = place / "bin" / "python"
    (site,) = place.glob("lib/python*/site-packages")
    borrowed = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    pip(str(interpreter), "install", "--no-deps", HUB_KERNELS)
    pip(str(interpreter), "install", "--no-deps", str(wheel))
    return interpreter


def test_the_wheel_holds_one_package_with_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"counterweight"}
    for needed in (
        "py.typed",
        "manifests/schema.json",
        "manifests/demo.yaml",
        "manifests/demo/model/model.safetensors",
        "kernels/gate/budgets.toml",
        "pipeline/service/templates/base.html",
        "pipeline/service/templates/service.css",
        "pipeline/cli.py",
        "workers/worker.py",
    ):
        assert f"counterweight/{needed}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Classifier: Typing :: Typed" in metadata


def test_both_packages_called_kernels_work(python: Path, tmp_path: Path) -> None:
    code = (
        "from kernels import get_kernel; from counterweight.kernels.weights.packing import pack; print(pack.__module__)"
    )
    assert ran([str(python), "-c", code], tmp_path).split() == ["counterweight.kernels.weights.packing"]


def test_a_job_runs_there_from_another_directory(python: Path, tmp_path: Path) -> None:
    code = "import counterweight; print(counterweight.__path__[0])"
    package = Path(ran([str(python), "-c", code], tmp_path).strip())
    assert python.parent.parent in package.parents
    command = [str(python.parent / "counterweight"), "run", str(package / "manifests" / "demo.yaml")]
    small = ["spec.calibration.sequences=8", "spec.validation.windows=4", "spec.validation.gates={}"]
    changes = [argument for change in small for argument in ("--set", change)]
    uri = ran([*command, *changes, "--output", "artifacts"], tmp_path).splitlines()[-1]
    assert uri.startswith((tmp_path / "artifacts").as_uri())
    load = f"import counterweight; print(type(counterweight.load_model({uri!r})).__name__)"
    assert ran([str(python), "-c", load], tmp_path).split() == ["LlamaForCausalLM"]


def pip(interpreter: str, *arguments: str) -> None:
    command = [interpreter, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode != 0:
        absent(f"pip {arguments[0]} failed: {done.stderr.strip()[-500:]}")


def ran(command: list[str], directory: Path) -> str:
    """stdout of a command that has to succeed, run as from a user's shell: nothing leads it to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
